/* A batch out of decoded images: rows picked, cropped, mirrored, and their bytes turned into numbers by a table.
 *
 * Each byte is read once and each number written once.  The table holds x / 127.5 - 1 in the wanted type, as the
 * definition computes it, so that what comes out is equal to the bit.
 */
#include "dcgan.h"

/* images (M, s, t, c) uint8 -> out (n, height, width, c), by rows (n) below M and, where they are given, flips (n) 0 or
 * 1, top (n) and left (n), which keep the crop within the image. */
#define GATHER(NAME, TYPE)                                                                                             \
    EXPORT void NAME(const uint8_t *images, const int64_t *rows, const uint8_t *flips, const int64_t *top,              \
                     const int64_t *left, const TYPE *table, TYPE *out, int n, int s, int t, int height, int width,     \
                     int c) {                                                                                          \
        _Pragma("omp parallel for schedule(static)") for (int i = 0; i < n; i++) {                                     \
            const size_t first = (size_t)rows[i] * s + (top ? top[i] : 0);                                             \
            const uint8_t *from = images + (first * t + (left ? left[i] : 0)) * c;                                     \
            TYPE *to = out + (size_t)i * height * width * c;                                                           \
            for (int y = 0; y < height; y++, from += t * c, to += width * c) {                                         \
                if (!flips || !flips[i]) {                                                                             \
                    for (int j = 0; j < width * c; j++) to[j] = table[from[j]];                                        \
                    continue;                                                                                          \
                }                                                                                                      \
                for (int x = 0; x < width; x++)                                                                        \
                    for (int k = 0; k < c; k++) to[x * c + k] = table[from[(width - 1 - x) * c + k]];                  \
            }                                                                                                          \
        }                                                                                                              \
    }

GATHER(dcgan_gather_16, uint16_t)
GATHER(dcgan_gather_32, uint32_t)
