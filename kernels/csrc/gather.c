/* A batch out of decoded images: rows picked, mirrored where wanted, and their bytes turned into numbers by a table.
 *
 * Each byte is read once and each number written once.  The table holds x / 127.5 - 1 in the wanted type, as the
 * definition computes it, so that what comes out is equal to the bit.
 */
#include "dcgan.h"

#define GATHER(NAME, TYPE)                                                                                             \
    /* images (M, height, width, c) uint8, rows (n) int64 below M, flips (n) 0 or 1 -> (n, height, width, c). */       \
    EXPORT void NAME(const uint8_t *images, const int64_t *rows, const uint8_t *flips, const TYPE *table, TYPE *out,    \
                     int n, int height, int width, int c) {                                                            \
        const size_t line = (size_t)width * c;                                                                         \
        _Pragma("omp parallel for schedule(static)") for (int i = 0; i < n; i++) {                                     \
            const uint8_t *from = images + (size_t)rows[i] * height * line;                                            \
            TYPE *to = out + (size_t)i * height * line;                                                                \
            if (!flips[i]) {                                                                                           \
                for (size_t j = 0; j < height * line; j++) to[j] = table[from[j]];                                     \
                continue;                                                                                              \
            }                                                                                                          \
            for (int y = 0; y < height; y++, from += line, to += line)                                                 \
                for (int x = 0; x < width; x++)                                                                        \
                    for (int k = 0; k < c; k++) to[x * c + k] = table[from[(width - 1 - x) * c + k]];                  \
        }                                                                                                              \
    }

GATHER(dcgan_gather_16, uint16_t)
GATHER(dcgan_gather_32, uint32_t)
