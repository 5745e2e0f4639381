/* A batch out of decoded images: rows picked, cropped, mirrored, and their bytes turned into numbers by a table.
 *
 * Each byte is read once and each number written once.  The table holds x / 127.5 - 1 in the wanted type, as the
 * definition computes it, so that what comes out is equal to the bit.  Of 16-bit numbers it fits into eight registers.
 */
#include "dcgan.h"

typedef struct {
    __m512i part[8];
} table16;

/* 32 bytes as 32 numbers. */
static inline __m512i look_up(const table16 *table, __m256i bytes) {
    const __m512i at = _mm512_cvtepu8_epi16(bytes);
    const __mmask32 bit6 = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64));
    const __mmask32 bit7 = _mm512_test_epi16_mask(at, _mm512_set1_epi16(128));
    __m512i quarter[4]; /* of the table, by the lower six bits */
    for (int i = 0; i < 4; i++) quarter[i] = _mm512_permutex2var_epi16(table->part[2 * i], at, table->part[2 * i + 1]);
    const __m512i low = _mm512_mask_blend_epi16(bit6, quarter[0], quarter[1]);
    const __m512i high = _mm512_mask_blend_epi16(bit6, quarter[2], quarter[3]);
    return _mm512_mask_blend_epi16(bit7, low, high);
}

/* The first count <= 64 bytes as numbers to `to`. */
static inline void put(uint16_t *to, const table16 *table, __m512i bytes, int count) {
    const __mmask64 wanted = _bzhi_u64(~0ull, count);
    _mm512_mask_storeu_epi16(to, (__mmask32)wanted, look_up(table, _mm512_castsi512_si256(bytes)));
    if (count > 32)
        _mm512_mask_storeu_epi16(to + 32, (__mmask32)(wanted >> 32), look_up(table, _mm512_extracti64x4_epi64(bytes, 1)));
}

static inline __m512i load(const uint8_t *from, int count) {
    return _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, count), from);
}

/* images (M, s, t, c) uint8 -> out (n, height, width, c), by rows (n) below M and, where they are given, flips (n) 0 or
 * 1, top (n) and left (n), which keep the crop within the image.  c is at most 64. */
EXPORT void dcgan_gather_16(const uint8_t *images, const int64_t *rows, const uint8_t *flips, const int64_t *top,
                            const int64_t *left, const uint16_t *values, uint16_t *out, int n, int s, int t, int height,
                            int width, int c) {
    table16 table;
    for (int i = 0; i < 8; i++) table.part[i] = _mm512_loadu_si512(values + 32 * i);
    const int length = width * c, whole = 64 / c * c; /* numbers of a row, and of the whole pixels in a register */
    uint8_t order[64] = {0};                          /* those pixels from the last to the first */
    for (int j = 0; j < whole; j++) order[j] = whole - c - j / c * c + j % c;
    const __m512i mirrored = _mm512_loadu_si512(order);
#pragma omp parallel for schedule(static)
    for (int i = 0; i < n; i++) {
        const size_t first = (size_t)rows[i] * s + (top ? top[i] : 0);
        const uint8_t *from = images + (first * t + (left ? left[i] : 0)) * c;
        uint16_t *to = out + (size_t)i * height * length;
        for (int y = 0; y < height; y++, from += t * c, to += length) {
            if (!flips || !flips[i]) {
                for (int j = 0; j < length; j += 64) {
                    const int count = MIN(64, length - j);
                    put(to + j, &table, load(from + j, count), count);
                }
                continue;
            }
            int j = 0;
            for (; j + whole <= length; j += whole) {
                const __m512i bytes = load(from + length - j - whole, whole);
                put(to + j, &table, _mm512_permutexvar_epi8(mirrored, bytes), whole);
            }
            for (; j < length; j++) to[j] = values[from[length - c - j / c * c + j % c]];
        }
    }
}

EXPORT void dcgan_gather_32(const uint8_t *images, const int64_t *rows, const uint8_t *flips, const int64_t *top,
                            const int64_t *left, const uint32_t *table, uint32_t *out, int n, int s, int t, int height,
                            int width, int c) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < n; i++) {
        const size_t first = (size_t)rows[i] * s + (top ? top[i] : 0);
        const uint8_t *from = images + (first * t + (left ? left[i] : 0)) * c;
        uint32_t *to = out + (size_t)i * height * width * c;
        for (int y = 0; y < height; y++, from += t * c, to += width * c) {
            if (!flips || !flips[i]) {
                for (int j = 0; j < width * c; j++) to[j] = table[from[j]];
                continue;
            }
            for (int x = 0; x < width; x++)
                for (int k = 0; k < c; k++) to[x * c + k] = table[from[(width - 1 - x) * c + k]];
        }
    }
}
