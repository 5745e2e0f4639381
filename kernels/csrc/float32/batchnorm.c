/* BatchNorm in training and the (leaky) ReLU after it, over activations (P pixels, N, C), forward and backward.
 *
 * What ../batchnorm.c computes, in float32: as there, sums are taken pixel by pixel about a first value of their channel,
 * and over the pixels in float64, in one order, whatever the number of threads.  `groups` equal parts of N are batches of
 * their own.
 */
#include "vector.h"

#include <math.h>

/* Statistics and output.
 *     mean, rstd  (groups, C), written
 *     running     mean and unbiased variance (C), moved by momentum for one group after the other; NULL: there are none
 *     partial     pixels * groups * 2 C of scratch
 * C is divisible by COLUMNS. */
EXPORT void dcgan32_batchnorm_forward(const float *x, float *y, const float *weight, const float *bias, float *mean,
                                      float *rstd, float *running_mean, float *running_var, float *partial, double momentum,
                                      double eps, float slope, int pixels, int n, int channels, int groups) {
    const int rows = n / groups;
    const double count = (double)pixels * rows;
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < pixels; p++)
            for (int g = 0; g < groups; g++)
                for (int c = 0; c < channels; c += COLUMNS) {
                    const float *of_pixel = x + ((size_t)p * n + g * rows) * channels + c;
                    const float *about = x + (size_t)g * rows * channels + c;
                    vec sums[2] = {{0}}, squares[2] = {{0}};
                    for (int i = 0; i < rows; i++)
                        for (int half = 0; half < 2; half++) {
                            const vec off = load(of_pixel + (size_t)i * channels + half * LANES) - load(about + half * LANES);
                            sums[half] += off;
                            squares[half] += off * off;
                        }
                    float *to = partial + ((size_t)p * groups + g) * 2 * channels + c;
                    for (int half = 0; half < 2; half++) {
                        store(to + half * LANES, sums[half]);
                        store(to + channels + half * LANES, squares[half]);
                    }
                }
#pragma omp for schedule(static)
        for (int c = 0; c < channels; c++)
            for (int g = 0; g < groups; g++) {
                double sum = 0, square = 0;
                for (int p = 0; p < pixels; p++) {
                    const float *from = partial + ((size_t)p * groups + g) * 2 * channels + c;
                    sum += from[0];
                    square += from[channels];
                }
                const double about = x[(size_t)g * rows * channels + c];
                const double off = sum / count, raw = square / count - off * off, variance = raw < 0 ? 0 : raw;
                mean[g * channels + c] = (float)(about + off);
                rstd[g * channels + c] = (float)(1 / sqrt(variance + eps));
                if (running_mean) {
                    running_mean[c] = (float)((1 - momentum) * running_mean[c] + momentum * (about + off));
                    running_var[c] = (float)((1 - momentum) * running_var[c] + momentum * variance * count / (count - 1));
                }
            }
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < pixels; p++)
            for (int g = 0; g < groups; g++)
                for (int c = 0; c < channels; c += LANES) {
                    const vec m = load(mean + g * channels + c), b = load(bias + c);
                    const vec scale = load(weight + c) * load(rstd + g * channels + c);
                    const size_t at = ((size_t)p * n + g * rows) * channels + c;
                    for (int i = 0; i < rows; i++) {
                        const vec z = (load(x + at + (size_t)i * channels) - m) * scale + b;
                        store(y + at + (size_t)i * channels, activated(z, slope));
                    }
                }
    }
}

/* Gradients of x, weight and bias (the last two over all groups), from that of y.
 *     partial  as before; means  groups * 2 C of scratch */
EXPORT void dcgan32_batchnorm_backward(const float *x, const float *dy, float *dx, const float *weight, const float *bias,
                                       const float *mean, const float *rstd, float *dweight, float *dbias, float *partial,
                                       float *means, float slope, int pixels, int n, int channels, int groups) {
    const int rows = n / groups;
    const double count = (double)pixels * rows;
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < pixels; p++)
            for (int g = 0; g < groups; g++)
                for (int c = 0; c < channels; c += COLUMNS) {
                    const size_t at = ((size_t)p * n + g * rows) * channels + c;
                    vec r[2], m[2], w[2], b[2], sums[2] = {{0}}, products[2] = {{0}};
                    for (int half = 0; half < 2; half++) {
                        const int j = c + half * LANES;
                        r[half] = load(rstd + g * channels + j), m[half] = load(mean + g * channels + j);
                        w[half] = load(weight + j), b[half] = load(bias + j);
                    }
                    for (int i = 0; i < rows; i++)
                        for (int half = 0; half < 2; half++) {
                            const size_t here = at + (size_t)i * channels + half * LANES;
                            const vec hat = (load(x + here) - m[half]) * r[half];
                            const vec d = through(load(dy + here), hat * w[half] + b[half], slope);
                            sums[half] += d;
                            products[half] += d * hat;
                        }
                    float *to = partial + ((size_t)p * groups + g) * 2 * channels + c;
                    for (int half = 0; half < 2; half++) {
                        store(to + half * LANES, sums[half]);
                        store(to + channels + half * LANES, products[half]);
                    }
                }
#pragma omp for schedule(static)
        for (int c = 0; c < channels; c++) {
            double all = 0, all_hat = 0;
            for (int g = 0; g < groups; g++) {
                double sum = 0, hat = 0;
                for (int p = 0; p < pixels; p++) {
                    const float *from = partial + ((size_t)p * groups + g) * 2 * channels + c;
                    sum += from[0];
                    hat += from[channels];
                }
                means[(g * 2) * channels + c] = (float)(sum / count);
                means[(g * 2 + 1) * channels + c] = (float)(hat / count);
                all += sum;
                all_hat += hat;
            }
            dbias[c] = (float)all;
            dweight[c] = (float)all_hat;
        }
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < pixels; p++)
            for (int g = 0; g < groups; g++)
                for (int c = 0; c < channels; c += LANES) {
                    const vec r = load(rstd + g * channels + c), m = load(mean + g * channels + c);
                    const vec w = load(weight + c), b = load(bias + c), scale = w * r;
                    const vec mean_d = load(means + (g * 2) * channels + c), mean_hat = load(means + (g * 2 + 1) * channels + c);
                    const size_t at = ((size_t)p * n + g * rows) * channels + c;
                    for (int i = 0; i < rows; i++) {
                        const vec hat = (load(x + at + (size_t)i * channels) - m) * r;
                        const vec d = through(load(dy + at + (size_t)i * channels), hat * w + b, slope);
                        store(dx + at + (size_t)i * channels, scale * (d - mean_d - hat * mean_hat));
                    }
                }
    }
}

/* The gradient before a leaky ReLU from that after it and its output: dx = dy where y is above 0, slope dy elsewhere. */
EXPORT void dcgan32_leaky_backward(const float *y, const float *dy, float *dx, float slope, size_t count) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i += LANES) store(dx + i, through(load(dy + i), load(y + i), slope));
}
