/* What the files in this folder share.  Legend: N images, H x W pixels, C channels.
 *
 * Activations are (H, W, N, C): the images of one pixel side by side.  Every tap of a convolution is then a product of
 * matrices, (N, C_in) by (C_in, C_out), whose rows lie at one stride whatever the size of the picture: AMX loads its
 * tiles where the activations lie, nothing is copied into columns, and a tap that falls into the padding is left out.
 */
#ifndef DCGAN_H
#define DCGAN_H

#include <immintrin.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16; /* bit pattern */

#define EXPORT __attribute__((visibility("default")))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Sixteen bf16 as float32: their bits moved up. */
static inline __m512 load_bf16(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

/* Rounded to the nearest, ties to even. */
static inline void store_bf16(bf16 *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }

static inline bf16 rounded(float x) { return (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0); }

/* a, then b. */
static inline __m512i two_as_bf16(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }

static inline __m512i load_as_bf16(const float *p) { return two_as_bf16(_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)); }

/* Leaky ReLU; a NaN stays one, and with slope 0 minus infinity becomes one. */
static inline __m512 activated(__m512 z, __m512 slope) {
    return _mm512_mask_mul_ps(z, _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ), z, slope);
}

/* Its gradient: d where z is above 0 or NaN, slope d elsewhere. */
static inline __m512 through(__m512 d, __m512 z, __m512 slope) {
    return _mm512_mask_mul_ps(d, _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LE_OQ), d, slope);
}

/* Two rows of 16 bf16 as 16 pairs. */
static inline __m512i interleave(__m256i a, __m256i b) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

/* 16 x 16 elements of 32 bits, in place. */
static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

/* (n, c) as B tiles over images, [k = n32 / 32][c / 16] of (16 pairs of images, 16 c), zeros from n to n32. */
static inline void pack_pairs(const bf16 *x, bf16 *packed, int n, int c) {
    for (int image = 0; image < (n + 31) / 32 * 32; image += 2) {
        const bf16 *a = x + (size_t)image * c;
        bf16 *out = packed + (size_t)image / 32 * 32 * c + image % 32 * 16;
        for (int j = 0; j < c / 16; j++) {
            __m512i both = _mm512_setzero_si512();
            if (image < n)
                both = interleave(_mm256_loadu_si256((const __m256i *)(a + 16 * j)),
                                  _mm256_loadu_si256((const __m256i *)(a + c + 16 * j)));
            _mm512_storeu_si512(out + 512 * j, both);
        }
    }
}

/* (n, c) as A tiles of its transpose, [k = n32 / 32][c / 16] of (16 c, 32 images), zeros beyond n. */
static inline void pack_transposed(const bf16 *x, bf16 *packed, int n, int c) {
    for (int k = 0; k < (n + 31) / 32; k++)
        for (int j = 0; j < c / 16; j++) {
            __m512i rows[16];
            for (int pair = 0; pair < 16; pair++) {
                const int image = k * 32 + 2 * pair;
                const bf16 *a = x + (size_t)image * c + 16 * j;
                rows[pair] = image < n ? interleave(_mm256_loadu_si256((const __m256i *)a),
                                                    _mm256_loadu_si256((const __m256i *)(a + c)))
                                       : _mm512_setzero_si512();
            }
            transpose16(rows);
            bf16 *out = packed + ((size_t)k * (c / 16) + j) * 512;
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + 32 * i, rows[i]);
        }
}

/* Before tiles are loaded from memory just written: of what a load reads, gcc's intrinsic names nothing. */
#define MEMORY_BARRIER() __asm__ volatile("" ::: "memory")

/* This thread's eight tiles: 16 rows of 64 bytes each. */
static inline void tiles_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_per_row[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes_per_row[i] = 64;
        config.rows[i] = 16;
    }
    /* Not _tile_loadconfig, which tells gcc (12.2) of 8 of these 64 bytes: it may then leave the others unwritten. */
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

/* The taps that reach an output pixel: which pixel of the input, which part of the weight. */
struct tap {
    int pixel, tap;
};

static inline int taps_down(struct tap *taps, int h, int w, int height, int width) {
    int count = 0;
    for (int kh = 0; kh < 4; kh++)
        for (int kw = 0; kw < 4; kw++) {
            const int y = 2 * h - 1 + kh, x = 2 * w - 1 + kw;
            if (y >= 0 && y < 2 * height && x >= 0 && x < 2 * width)
                taps[count++] = (struct tap){y * 2 * width + x, kh * 4 + kw};
        }
    return count;
}

static inline int taps_up(struct tap *taps, int y, int x, int height, int width) {
    int count = 0;
    for (int kh = (y + 1) & 1; kh < 4; kh += 2)
        for (int kw = (x + 1) & 1; kw < 4; kw += 2) {
            const int h = (y + 1 - kh) / 2, w = (x + 1 - kw) / 2;
            if (y + 1 - kh >= 0 && h < height && x + 1 - kw >= 0 && w < width)
                taps[count++] = (struct tap){h * width + w, kh * 4 + kw};
        }
    return count;
}

#endif
