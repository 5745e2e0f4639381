/* The ends of both networks, where one side of a 4x4, stride 2, padding 1 convolution is a picture of 1 to 4 channels.
 *
 * The picture is (N, 2H, 2W, C) bf16, as networks' callers hold it; the other side (H, W, N, C_s).  The 4 x 4 x C numbers
 * under a pixel are laid side by side as K = 64: four rows of 4 C, each filled up with zeros to 16.  They never leave the
 * first-level cache.
 *     down  from the picture: D's first layer, with its LeakyReLU, and the input gradient of G's last
 *     up    to the picture: G's last layer, and the input gradient of D's first
 *     grad  the weight's gradient of either
 * Tiles as in conv.c.
 */
#include "dcgan.h"

#define K 64

/* W (cs, 4, 4, c) float32 as B tiles for `down`: [cs / 32][2 parts of K][2 halves of cs] of (16 pairs, 16 cs). */
EXPORT void dcgan_image_pack_down(const float *w, bf16 *packed, int cs, int c) {
    memset(packed, 0, (size_t)cs * K * sizeof(bf16));
    for (int s = 0; s < cs; s++)
        for (int kh = 0; kh < 4; kh++)
            for (int j = 0; j < 4 * c; j++) {
                int k = kh * 16 + j, tile = (s / 32 * 2 + k / 32) * 2 + s % 32 / 16;
                packed[(size_t)tile * 512 + k % 32 / 2 * 32 + s % 16 * 2 + k % 2] =
                    rounded(w[(s * 4 + kh) * 4 * c + j]);
            }
}

/* W (cs, 4, 4, c) float32 as B tiles for `up`: [tap][cs / 32] of (16 pairs of cs, 16 of which c are not 0). */
EXPORT void dcgan_image_pack_up(const float *w, bf16 *packed, int cs, int c) {
    memset(packed, 0, (size_t)16 * cs * 16 * sizeof(bf16));
    for (int s = 0; s < cs; s++)
        for (int tap = 0; tap < 16; tap++)
            for (int j = 0; j < c; j++)
                packed[((size_t)tap * (cs / 32) + s / 32) * 512 + s % 32 / 2 * 32 + j * 2 + s % 2] =
                    rounded(w[(s * 16 + tap) * c + j]);
}

/* What lies under small pixel (h, w) in every picture: (n, K). */
static inline void columns(const bf16 *images, bf16 *out, int h, int w, int height, int width, int n, int c) {
    __mmask16 mask = (__mmask16)((1u << 4 * c) - 1);
    if (w == 0) mask &= (__mmask16) ~((1u << c) - 1);
    if (w == width - 1) mask &= (__mmask16)((1u << 3 * c) - 1);
    const ptrdiff_t line = (ptrdiff_t)2 * width * c;
    for (int i = 0; i < n; i++)
        for (int kh = 0; kh < 4; kh++) {
            const int y = 2 * h - 1 + kh;
            __m256i row = _mm256_setzero_si256();
            if (y >= 0 && y < 2 * height)
                row = _mm256_maskz_loadu_epi16(mask, images + ((ptrdiff_t)i * 2 * height + y) * line + (2 * w - 1) * c);
            _mm256_storeu_si256((__m256i *)(out + i * K + kh * 16), row);
        }
}

/* Images (n, 2 height, 2 width, c) -> (height, width, n, cs), through a leaky ReLU of this slope; 1: none. */
EXPORT int dcgan_image_down(const bf16 *images, const bf16 *packed, bf16 *out, float slope, int height, int width, int n,
                            int cs, int c) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        bf16 *under = aligned_alloc(64, (size_t)n * K * sizeof(bf16));
        float sums[32 * 32] __attribute__((aligned(64)));
        const __m512 slopes = _mm512_set1_ps(slope);
        failed |= !under;
        tiles_begin();
#pragma omp for schedule(static)
        for (int p = 0; p < height * width; p++) {
            if (!under) continue;
            columns(images, under, p / width, p % width, height, width, n, c);
            MEMORY_BARRIER();
            for (int b = 0; b < cs / 32; b++) {
                const bf16 *tiles = packed + (size_t)b * 2048;
                for (int m = 0; m < n; m += 32) {
                    const int rows = MIN(32, n - m);
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                    for (int k = 0; k < 2; k++) {
                        _tile_loadd(4, under + m * K + 32 * k, 2 * K);
                        _tile_loadd(6, tiles + 1024 * k, 64);
                        _tile_loadd(7, tiles + 1024 * k + 512, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 4, 7);
                        if (rows > 16) {
                            _tile_loadd(5, under + (m + 16) * K + 32 * k, 2 * K);
                            _tile_dpbf16ps(2, 5, 6);
                            _tile_dpbf16ps(3, 5, 7);
                        }
                    }
                    _tile_stored(0, sums, 128);
                    _tile_stored(1, sums + 16, 128);
                    _tile_stored(2, sums + 512, 128);
                    _tile_stored(3, sums + 528, 128);
                    bf16 *to = out + ((size_t)p * n + m) * cs + b * 32;
                    for (int i = 0; i < rows; i++) {
                        __m512 x = _mm512_load_ps(sums + 32 * i), y = _mm512_load_ps(sums + 32 * i + 16);
                        x = _mm512_mask_mul_ps(x, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), x, slopes);
                        y = _mm512_mask_mul_ps(y, _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ), y, slopes);
                        _mm512_storeu_si512(to + (size_t)i * cs, two_as_bf16(x, y));
                    }
                }
            }
        }
        _tile_release();
        free(under);
    }
    return failed;
}

/* (height, width, n, cs) -> images (n, 2 height, 2 width, c).  Always 0: it takes no memory. */
EXPORT int dcgan_image_up(const bf16 *small, const bf16 *packed, bf16 *images, int height, int width, int n, int cs,
                           int c) {
    const int kc = cs / 32;
    const size_t row = (size_t)cs * sizeof(bf16), image = (size_t)4 * height * width * c;
    const __mmask16 mask = (__mmask16)((1u << c) - 1);
#pragma omp parallel
    {
        float sums[64 * 16] __attribute__((aligned(64)));
        tiles_begin();
#pragma omp for schedule(static)
        for (int y = 0; y < 2 * height; y++)
            for (int x = 0; x < 2 * width; x++) {
                struct tap taps[4];
                const int count = taps_up(taps, y, x, height, width);
                for (int m = 0; m < n; m += 64) {
                    const int rows = MIN(64, n - m);
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                    for (int t = 0; t < count; t++) {
                        const bf16 *a = small + ((size_t)taps[t].pixel * n + m) * cs;
                        const bf16 *b = packed + (size_t)taps[t].tap * kc * 512;
                        for (int k = 0; k < kc; k++) {
                            _tile_loadd(6, b + 512 * k, 64);
                            _tile_loadd(4, a + 32 * k, row);
                            _tile_dpbf16ps(0, 4, 6);
                            if (rows > 16) {
                                _tile_loadd(5, a + (size_t)16 * cs + 32 * k, row);
                                _tile_dpbf16ps(1, 5, 6);
                            }
                            if (rows > 32) {
                                _tile_loadd(4, a + (size_t)32 * cs + 32 * k, row);
                                _tile_dpbf16ps(2, 4, 6);
                            }
                            if (rows > 48) {
                                _tile_loadd(5, a + (size_t)48 * cs + 32 * k, row);
                                _tile_dpbf16ps(3, 5, 6);
                            }
                        }
                    }
                    _tile_stored(0, sums, 64);
                    _tile_stored(1, sums + 256, 64);
                    _tile_stored(2, sums + 512, 64);
                    _tile_stored(3, sums + 768, 64);
                    bf16 *to = images + m * image + ((size_t)y * 2 * width + x) * c;
                    for (int i = 0; i < rows; i++)
                        _mm256_mask_storeu_epi16(to + i * image, mask,
                                                 (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums + 16 * i)));
                }
            }
        _tile_release();
    }
    return 0;
}

/* W (cs, 4, 4, c) float32 from small (height, width, n, cs) and images (n, 2 height, 2 width, c).
 * `partial`: height * cs * K float32 of scratch, a sum for each row of pixels, so that the order of adding is fixed. */
EXPORT int dcgan_image_grad(const bf16 *small, const bf16 *images, float *grad, float *partial, int height, int width,
                            int n, int cs, int c) {
    const int ks = (n + 31) / 32;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        bf16 *under = aligned_alloc(64, (size_t)n * K * sizeof(bf16));
        bf16 *b_tiles = aligned_alloc(64, (size_t)width * ks * K * 32 * sizeof(bf16));
        bf16 *a_tiles = aligned_alloc(64, (size_t)width * ks * cs * 32 * sizeof(bf16));
        failed |= !under || !a_tiles || !b_tiles;
        tiles_begin();
#pragma omp for schedule(static)
        for (int h = 0; h < height; h++) {
            if (!under || !a_tiles || !b_tiles) continue;
            for (int w = 0; w < width; w++) {
                columns(images, under, h, w, height, width, n, c);
                pack_pairs(under, b_tiles + (size_t)w * ks * K * 32, n, K);
                pack_transposed(small + (size_t)(h * width + w) * n * cs, a_tiles + (size_t)w * ks * cs * 32, n, cs);
            }
            MEMORY_BARRIER();
            for (int i = 0; i < cs / 32; i++)
                for (int j = 0; j < K / 32; j++) {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                    for (int k = 0; k < width * ks; k++) {
                        const bf16 *a = a_tiles + (size_t)k * cs * 32 + i * 1024;
                        const bf16 *b = b_tiles + (size_t)k * K * 32 + j * 1024;
                        _tile_loadd(4, a, 64);
                        _tile_loadd(6, b, 64);
                        _tile_loadd(7, b + 512, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_loadd(5, a + 512, 64);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                    float *to = partial + ((size_t)h * cs + i * 32) * K + j * 32;
                    _tile_stored(0, to, 4 * K);
                    _tile_stored(1, to + 16, 4 * K);
                    _tile_stored(2, to + 16 * K, 4 * K);
                    _tile_stored(3, to + 16 * K + 16, 4 * K);
                }
        }
        _tile_release();
        free(under);
        free(a_tiles);
        free(b_tiles);
#pragma omp for schedule(static)
        for (int s = 0; s < cs; s++)
            for (int kh = 0; kh < 4; kh++) {
                __m512 sum = _mm512_setzero_ps();
                for (int h = 0; h < height; h++)
                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(partial + ((size_t)h * cs + s) * K + kh * 16));
                _mm512_mask_storeu_ps(grad + (s * 4 + kh) * 4 * c, (__mmask16)((1u << 4 * c) - 1), sum);
            }
    }
    return failed;
}
