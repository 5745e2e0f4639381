/* Convolution and transposed convolution 4x4, stride 2, padding 1, in bf16 with float32 sums, on AMX.
 *
 * One weight W (C_s, 4, 4, C_l) joins a small picture (H, W, N, C_s) and a large one (2H, 2W, N, C_l):
 *     down  small[h, w] = sum over kh, kw of large[2h - 1 + kh, 2w - 1 + kw] W[:, kh, kw, :]^T
 *     up    large[y, x] = sum over kh, kw of small[h, w] W[:, kh, kw, :]      where y = 2h - 1 + kh, x = 2w - 1 + kw
 *     grad  W[:, kh, kw, :] = sum over h, w of small[h, w]^T large[2h - 1 + kh, 2w - 1 + kw]
 * down is a convolution's forward pass and a transposed one's input gradient, up the other way round, grad both
 * gradients of the weight.  Each element is summed in one order, so results do not depend on the number of threads.
 *
 * Tiles: 0-3 sums (2 x 2), 4-5 rows of A, 6-7 columns of B; A (16, 32) bf16, B (16 pairs, 16, 2) bf16, C (16, 16) float32.
 */
#define _GNU_SOURCE
#include "dcgan.h"

#include <sys/syscall.h>
#include <unistd.h>

/* The kernel's leave to use tiles; 0 where it is given. */
EXPORT int dcgan_amx_begin(void) { return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18); }

/* W (cs, 16, cl) float32 as B tiles for `down`: [cs / 32][tap][cl / 32][2 halves of cs] of (cl pairs, 16 cs). */
EXPORT void dcgan_pack_down(const float *w, bf16 *packed, int cs, int cl) {
    const int kc = cl / 32;
#pragma omp parallel for collapse(2) schedule(static)
    for (int block = 0; block < cs / 32; block++)
        for (int tap = 0; tap < 16; tap++)
            for (int k = 0; k < kc; k++)
                for (int half = 0; half < 2; half++) {
                    __m512i rows[16];
                    for (int i = 0; i < 16; i++)
                        rows[i] = load_as_bf16(w + ((size_t)(block * 32 + half * 16 + i) * 16 + tap) * cl + k * 32);
                    transpose16(rows);
                    bf16 *out = packed + ((((size_t)block * 16 + tap) * kc + k) * 2 + half) * 512;
                    for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + 32 * i, rows[i]);
                }
}

/* W (cs, 16, cl) float32 as B tiles for `up`: [cl / 32][tap][cs / 32][2 halves of cl] of (cs pairs, 16 cl). */
EXPORT void dcgan_pack_up(const float *w, bf16 *packed, int cs, int cl) {
    const int kc = cs / 32;
#pragma omp parallel for collapse(2) schedule(static)
    for (int block = 0; block < cl / 32; block++)
        for (int tap = 0; tap < 16; tap++)
            for (int k = 0; k < kc; k++) {
                bf16 *out = packed + (((size_t)block * 16 + tap) * kc + k) * 1024;
                for (int pair = 0; pair < 16; pair++) {
                    const float *a = w + ((size_t)(k * 32 + 2 * pair) * 16 + tap) * cl + block * 32;
                    const float *b = a + (size_t)16 * cl;
                    for (int half = 0; half < 2; half++) {
                        __m256i lo = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(a + 16 * half));
                        __m256i hi = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(b + 16 * half));
                        _mm512_storeu_si512(out + 512 * half + 32 * pair, interleave(lo, hi));
                    }
                }
            }
}

/* Sums (rows, 32 columns) float32 rounded into out, whose rows lie `stride` apart. */
static inline void store_block(const float *sums, bf16 *out, size_t stride, int rows) {
    for (int i = 0; i < rows; i++)
        _mm512_storeu_si512(out + i * stride, load_as_bf16(sums + 32 * i));
}

/* Images first .. end - 1 of one output pixel, 32 columns: sum over taps of (images, cin) by (cin, 32). */
static inline void pixel_product(const bf16 *in, const bf16 *panel, bf16 *out, const struct tap *taps, int num_taps,
                                 int first, int end, int n, int cin, int cout) {
    const int kc = cin / 32;
    const size_t row = (size_t)cin * sizeof(bf16);
    float sums[32 * 32] __attribute__((aligned(64)));
    int m = first;
    for (; m + 32 <= end; m += 32) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int t = 0; t < num_taps; t++) {
            const bf16 *a = in + ((size_t)taps[t].pixel * n + m) * cin;
            const bf16 *b = panel + (size_t)taps[t].tap * kc * 1024;
            for (int k = 0; k < kc; k++) {
                _tile_loadd(4, a + 32 * k, row);
                _tile_loadd(6, b + 1024 * k, 64);
                _tile_loadd(7, b + 1024 * k + 512, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a + 16 * cin + 32 * k, row);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, sums, 128);
        _tile_stored(1, sums + 16, 128);
        _tile_stored(2, sums + 512, 128);
        _tile_stored(3, sums + 528, 128);
        store_block(sums, out + (size_t)m * cout, cout, 32);
    }
    if (m < end) { /* sixteen more */
        _tile_zero(0);
        _tile_zero(1);
        for (int t = 0; t < num_taps; t++) {
            const bf16 *a = in + ((size_t)taps[t].pixel * n + m) * cin;
            const bf16 *b = panel + (size_t)taps[t].tap * kc * 1024;
            for (int k = 0; k < kc; k++) {
                _tile_loadd(4, a + 32 * k, row);
                _tile_loadd(6, b + 1024 * k, 64);
                _tile_loadd(7, b + 1024 * k + 512, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
            }
        }
        _tile_stored(0, sums, 128);
        _tile_stored(1, sums + 16, 128);
        store_block(sums, out + (size_t)m * cout, cout, 16);
    }
}

/* So many images at a time: those of the pixels around one another stay in the second-level cache. */
#define IMAGES_AT_ONCE 128

/* Columns, by 32, whose part of the weight stays there beside the activations. */
static int columns_at_once(int cin, int taps) {
    int blocks = (512 << 10) / (taps * cin * 64);
    return blocks < 1 ? 1 : blocks;
}

/* (2 height, 2 width, n, cl) -> (height, width, n, cs).  Always 0: it takes no memory. */
EXPORT int dcgan_down(const bf16 *large, const bf16 *packed, bf16 *small, int height, int width, int n, int cs, int cl) {
    const int blocks = cs / 32, group = MIN(columns_at_once(cl, 16), blocks), groups = (blocks + group - 1) / group;
    const size_t panel = (size_t)16 * cl * 32;
#pragma omp parallel
    {
        tiles_begin();
#pragma omp for collapse(3) schedule(static)
        for (int g = 0; g < groups; g++)
            for (int first = 0; first < n; first += IMAGES_AT_ONCE)
                for (int p = 0; p < height * width; p++) {
                    struct tap taps[16];
                    const int count = taps_down(taps, p / width, p % width, height, width);
                    for (int b = g * group; b < MIN((g + 1) * group, blocks); b++)
                        pixel_product(large, packed + b * panel, small + (size_t)p * n * cs + b * 32, taps, count, first,
                                      MIN(first + IMAGES_AT_ONCE, n), n, cl, cs);
                }
        _tile_release();
    }
    return 0;
}

/* (height, width, n, cs) -> (2 height, 2 width, n, cl).  Always 0. */
EXPORT int dcgan_up(const bf16 *small, const bf16 *packed, bf16 *large, int height, int width, int n, int cs, int cl) {
    const int blocks = cl / 32, group = MIN(columns_at_once(cs, 4), blocks), groups = (blocks + group - 1) / group;
    const size_t panel = (size_t)16 * cs * 32;
#pragma omp parallel
    {
        tiles_begin();
#pragma omp for collapse(3) schedule(static)
        for (int item = 0; item < 4 * groups; item++)
            for (int first = 0; first < n; first += IMAGES_AT_ONCE)
                for (int p = 0; p < height * width; p++) {
                    struct tap taps[4];
                    const int parity = item % 4, g = item / 4;
                    const int y = p / width * 2 + (parity >> 1), x = p % width * 2 + (parity & 1);
                    const int count = taps_up(taps, y, x, height, width);
                    for (int b = g * group; b < MIN((g + 1) * group, blocks); b++)
                        pixel_product(small, packed + b * panel, large + ((size_t)y * 2 * width + x) * n * cl + b * 32,
                                      taps, count, first, MIN(first + IMAGES_AT_ONCE, n), n, cs, cl);
                }
        _tile_release();
    }
    return 0;
}

/* Every pixel of (pixels, n, c) as pack_pairs has it. */
EXPORT void dcgan_pack_pairs(const bf16 *x, bf16 *packed, int pixels, int n, int c) {
#pragma omp parallel for schedule(static)
    for (int p = 0; p < pixels; p++)
        pack_pairs(x + (size_t)p * n * c, packed + (size_t)p * ((n + 31) / 32 * 32) * c, n, c);
}

/* Every pixel of (pixels, n, c) as pack_transposed has it. */
EXPORT void dcgan_pack_transposed(const bf16 *x, bf16 *packed, int pixels, int n, int c) {
#pragma omp parallel for schedule(static)
    for (int p = 0; p < pixels; p++)
        pack_transposed(x + (size_t)p * n * c, packed + (size_t)p * ((n + 31) / 32 * 32) * c, n, c);
}

/* Adds to 32 x 32 sums in tiles: small rows h0 .. h1 - 1, images by 32 from k0 to k1 - 1, under one tap. */
static inline void grad_block(const bf16 *a, const bf16 *b, size_t a_step, size_t b_step, int tap, int h0, int h1, int k0,
                              int k1, int ks, int height, int width) {
    const int kh = tap / 4, kw = tap % 4, w1 = kw == 3 ? width - 1 : width;
    for (int h = h0; h < h1; h++) {
        const int y = 2 * h - 1 + kh;
        if (y < 0 || y >= 2 * height) continue;
        for (int w = kw == 0; w < w1; w++) {
            const bf16 *of_small = a + (size_t)(h * width + w) * ks * a_step;
            const bf16 *of_large = b + (size_t)(y * 2 * width + 2 * w - 1 + kw) * ks * b_step;
            for (int k = k0; k < k1; k++) {
                _tile_loadd(4, of_small + k * a_step, 64);
                _tile_loadd(6, of_large + k * b_step, 64);
                _tile_loadd(7, of_large + k * b_step + 512, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, of_small + k * a_step + 512, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
}

/* W (cs, 16, cl) float32 from small as pack_transposed has it and large as pack_pairs has it. */
EXPORT void dcgan_grad(const bf16 *small_t, const bf16 *large_p, float *grad, int height, int width, int n, int cs, int cl) {
    const int ks = (n + 31) / 32;
    const size_t a_step = (size_t)(cs / 16) * 512, b_step = (size_t)(cl / 16) * 512;
    /* A chunk: some rows of small pixels, or some images of one row, such that 32 columns of small fill 256 KiB at most.
     * A group: as many columns of small as fill 512 KiB.  Both stay in the second-level cache beside 32 of large. */
    const int k_at_once = MIN(ks, MAX(1, (256 << 10) / (width * 2048)));
    const int k_chunks = (ks + k_at_once - 1) / k_at_once;
    const int rows_at_once = MIN(height, MAX(1, (256 << 10) / (width * k_at_once * 2048)));
    const int chunks = (height + rows_at_once - 1) / rows_at_once * k_chunks;
    const int group = MIN(cs / 32, MAX(1, (512 << 10) / (rows_at_once * width * k_at_once * 2048)));
    const int groups = (cs / 32 + group - 1) / group;
#pragma omp parallel
    {
        tiles_begin();
#pragma omp for collapse(2) schedule(static)
        for (int g = 0; g < groups; g++)
            for (int j = 0; j < cl / 32; j++)
                for (int chunk = 0; chunk < chunks; chunk++)
                    for (int tap = 0; tap < 16; tap++) {
                        const int h0 = chunk / k_chunks * rows_at_once, k0 = chunk % k_chunks * k_at_once;
                        for (int i = g * group; i < MIN((g + 1) * group, cs / 32); i++) {
                            float *to = grad + ((size_t)i * 32 * 16 + tap) * cl + j * 32;
                            const size_t stride = (size_t)16 * cl * sizeof(float), half = (size_t)16 * 16 * cl;
                            if (chunk == 0) {
                                _tile_zero(0);
                                _tile_zero(1);
                                _tile_zero(2);
                                _tile_zero(3);
                            } else {
                                _tile_loadd(0, to, stride);
                                _tile_loadd(1, to + 16, stride);
                                _tile_loadd(2, to + half, stride);
                                _tile_loadd(3, to + half + 16, stride);
                            }
                            grad_block(small_t + i * 1024, large_p + j * 1024, a_step, b_step, tap, h0,
                                       MIN(h0 + rows_at_once, height), k0, MIN(k0 + k_at_once, ks), ks, height, width);
                            _tile_stored(0, to, stride);
                            _tile_stored(1, to + 16, stride);
                            _tile_stored(2, to + half, stride);
                            _tile_stored(3, to + half + 16, stride);
                        }
                    }
        _tile_release();
    }
}
