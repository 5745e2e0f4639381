/* BatchNorm in training and the (leaky) ReLU after it, over activations (P pixels, N, C), forward and backward.
 *
 *     y = act(x_hat weight + bias),  x_hat = (x - mean) / sqrt(variance + eps),  act(z) = z above 0, slope z below
 * The images may be several batches side by side, each with its own statistics (`groups` equal parts of N).
 *
 * Sums are taken pixel by pixel in float32, about a first value of their channel, so that no large mean eats a small
 * variance, and over the pixels in float64: in one order, whatever the number of threads.
 */
#include "batchnorm_sums.h"
#include "dcgan.h"

static inline void sums_of_pixel(const bf16 *x, const bf16 *about, int rows, int channels, float *sum, float *square) {
    for (int c = 0; c < channels; c += 16) {
        __m512 shift = load_bf16(about + c), s = _mm512_setzero_ps(), q = s, s1 = s, q1 = s;
        for (int i = 0; i < rows; i += 2) {
            __m512 a = _mm512_sub_ps(load_bf16(x + (size_t)i * channels + c), shift);
            __m512 b = _mm512_sub_ps(load_bf16(x + (size_t)(i + 1) * channels + c), shift);
            s = _mm512_add_ps(s, a);
            q = _mm512_fmadd_ps(a, a, q);
            s1 = _mm512_add_ps(s1, b);
            q1 = _mm512_fmadd_ps(b, b, q1);
        }
        _mm512_storeu_ps(sum + c, _mm512_add_ps(s, s1));
        _mm512_storeu_ps(square + c, _mm512_add_ps(q, q1));
    }
}

/* Statistics and output.
 *     mean, rstd  (groups, C) float32, written
 *     running     mean and unbiased variance (C), moved by momentum for one group after the other
 *     scratch     pixels * groups * 2 C float32
 * N / groups is even, C divisible by 16. */
EXPORT void dcgan_batchnorm_forward(const bf16 *x, bf16 *y, const float *weight, const float *bias, float *mean,
                                    float *rstd, float *running_mean, float *running_var, float *scratch, double momentum,
                                    double eps, float slope, int pixels, int n, int channels, int groups) {
    const int rows = n / groups;
    const double count = (double)pixels * rows;
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < pixels; p++)
            for (int g = 0; g < groups; g++) {
                float *to = scratch + ((size_t)p * groups + g) * 2 * channels;
                sums_of_pixel(x + ((size_t)p * n + g * rows) * channels, x + (size_t)g * rows * channels, rows, channels,
                              to, to + channels);
            }
#pragma omp for schedule(static)
        for (int c = 0; c < channels; c++)
            for (int g = 0; g < groups; g++) {
                const uint32_t bits = (uint32_t)x[(size_t)g * rows * channels + c] << 16;
                float about;
                memcpy(&about, &bits, sizeof about);
                statistics(over_pixels(scratch, pixels, groups, g, channels, c), about, count, eps, momentum,
                           mean + g * channels + c, rstd + g * channels + c, running_mean ? running_mean + c : NULL,
                           running_mean ? running_var + c : NULL);
            }
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < pixels; p++)
            for (int g = 0; g < groups; g++)
                for (int c = 0; c < channels; c += 16) {
                    const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(weight + c), _mm512_loadu_ps(rstd + g * channels + c));
                    const __m512 m = _mm512_loadu_ps(mean + g * channels + c), b = _mm512_loadu_ps(bias + c);
                    const size_t at = ((size_t)p * n + g * rows) * channels + c;
                    for (int i = 0; i < rows; i++) {
                        __m512 z = _mm512_fmadd_ps(_mm512_sub_ps(load_bf16(x + at + (size_t)i * channels), m), scale, b);
                        store_bf16(y + at + (size_t)i * channels, activated(z, _mm512_set1_ps(slope)));
                    }
                }
    }
}

/* Gradients of x (bf16), weight and bias (float32, over all groups), from that of y.  Scratch as before. */
EXPORT void dcgan_batchnorm_backward(const bf16 *x, const bf16 *dy, bf16 *dx, const float *weight, const float *bias,
                                     const float *mean, const float *rstd, float *dweight, float *dbias, float *scratch,
                                     float *means, float slope, int pixels, int n, int channels, int groups) {
    const int rows = n / groups;
    const double count = (double)pixels * rows;
    const __m512 slopes = _mm512_set1_ps(slope);
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < pixels; p++)
            for (int g = 0; g < groups; g++)
                for (int c = 0; c < channels; c += 16) {
                    const __m512 r = _mm512_loadu_ps(rstd + g * channels + c), m = _mm512_loadu_ps(mean + g * channels + c);
                    const __m512 w = _mm512_loadu_ps(weight + c), b = _mm512_loadu_ps(bias + c);
                    const size_t at = ((size_t)p * n + g * rows) * channels + c;
                    __m512 s = _mm512_setzero_ps(), q = s;
                    for (int i = 0; i < rows; i++) {
                        const __m512 hat = _mm512_mul_ps(_mm512_sub_ps(load_bf16(x + at + (size_t)i * channels), m), r);
                        const __m512 d = through(load_bf16(dy + at + (size_t)i * channels), _mm512_fmadd_ps(hat, w, b), slopes);
                        s = _mm512_add_ps(s, d);
                        q = _mm512_fmadd_ps(d, hat, q);
                    }
                    float *to = scratch + ((size_t)p * groups + g) * 2 * channels + c;
                    _mm512_storeu_ps(to, s);
                    _mm512_storeu_ps(to + channels, q);
                }
#pragma omp for schedule(static)
        for (int c = 0; c < channels; c++)
            gradients(scratch, count, dweight, dbias, means, pixels, groups, channels, c);
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < pixels; p++)
            for (int g = 0; g < groups; g++)
                for (int c = 0; c < channels; c += 16) {
                    const __m512 r = _mm512_loadu_ps(rstd + g * channels + c), m = _mm512_loadu_ps(mean + g * channels + c);
                    const __m512 w = _mm512_loadu_ps(weight + c), b = _mm512_loadu_ps(bias + c);
                    const __m512 mean_d = _mm512_loadu_ps(means + (g * 2) * channels + c);
                    const __m512 mean_hat = _mm512_loadu_ps(means + (g * 2 + 1) * channels + c);
                    const __m512 scale = _mm512_mul_ps(w, r);
                    const size_t at = ((size_t)p * n + g * rows) * channels + c;
                    for (int i = 0; i < rows; i++) {
                        const __m512 hat = _mm512_mul_ps(_mm512_sub_ps(load_bf16(x + at + (size_t)i * channels), m), r);
                        const __m512 d = through(load_bf16(dy + at + (size_t)i * channels), _mm512_fmadd_ps(hat, w, b), slopes);
                        const __m512 rest = _mm512_fnmadd_ps(hat, mean_hat, _mm512_sub_ps(d, mean_d));
                        store_bf16(dx + at + (size_t)i * channels, _mm512_mul_ps(scale, rest));
                    }
                }
    }
}

/* The gradient before a leaky ReLU from that after it and its output: dx = dy where y is above 0, slope dy elsewhere. */
EXPORT void dcgan_leaky_backward(const bf16 *y, const bf16 *dy, bf16 *dx, float slope, size_t count) {
    const __m512 slopes = _mm512_set1_ps(slope);
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i += 16)
        store_bf16(dx + i, through(load_bf16(dy + i), load_bf16(y + i), slopes));
}
