/* BatchNorm in training and the (leaky) ReLU after it, over activations (P pixels, N, C), forward and backward.
 *
 * What ../batchnorm.c computes, in float32: as there, sums are taken pixel by pixel about a first value of their channel,
 * and over the pixels in float64 (batchnorm_sums.h), in one order, whatever the number of threads.  `groups` equal parts of N are batches of
 * their own.
 */
#include "../batchnorm_sums.h"
#include "vector.h"

/* The layer at LANES channels of one group, and what the backward pass makes of a number there. */
struct lanes {
    vec mean, rstd, weight, bias;
};

static inline struct lanes lanes_at(const float *mean, const float *rstd, const float *weight, const float *bias,
                                    int group, int channels, int c) {
    return (struct lanes){load(mean + group * channels + c), load(rstd + group * channels + c), load(weight + c),
                          load(bias + c)};
}

struct passed {
    vec hat, d;
};

static inline struct passed pass_back(struct lanes at, const float *x, const float *dy, float slope) {
    const vec hat = (load(x) - at.mean) * at.rstd;
    return (struct passed){hat, through(load(dy), hat * at.weight + at.bias, slope)};
}

static inline void store_two(float *to, const vec x[2]) {
    store(to, x[0]);
    store(to + LANES, x[1]);
}

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
                    store_two(to, sums);
                    store_two(to + channels, squares);
                }
#pragma omp for schedule(static)
        for (int c = 0; c < channels; c++)
            for (int g = 0; g < groups; g++) {
                const float about = x[(size_t)g * rows * channels + c];
                statistics(over_pixels(partial, pixels, groups, g, channels, c), about, count, eps, momentum,
                           mean + g * channels + c, rstd + g * channels + c, running_mean ? running_mean + c : NULL,
                           running_mean ? running_var + c : NULL);
            }
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < pixels; p++)
            for (int g = 0; g < groups; g++)
                for (int c = 0; c < channels; c += LANES) {
                    const struct lanes layer = lanes_at(mean, rstd, weight, bias, g, channels, c);
                    const vec scale = layer.weight * layer.rstd;
                    const size_t at = ((size_t)p * n + g * rows) * channels + c;
                    for (int i = 0; i < rows; i++) {
                        const vec z = (load(x + at + (size_t)i * channels) - layer.mean) * scale + layer.bias;
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
                    const struct lanes layer[2] = {lanes_at(mean, rstd, weight, bias, g, channels, c),
                                                   lanes_at(mean, rstd, weight, bias, g, channels, c + LANES)};
                    vec sums[2] = {{0}}, products[2] = {{0}};
                    for (int i = 0; i < rows; i++)
                        for (int half = 0; half < 2; half++) {
                            const size_t here = at + (size_t)i * channels + half * LANES;
                            const struct passed at_x = pass_back(layer[half], x + here, dy + here, slope);
                            sums[half] += at_x.d;
                            products[half] += at_x.d * at_x.hat;
                        }
                    float *to = partial + ((size_t)p * groups + g) * 2 * channels + c;
                    store_two(to, sums);
                    store_two(to + channels, products);
                }
#pragma omp for schedule(static)
        for (int c = 0; c < channels; c++)
            gradients(partial, count, dweight, dbias, means, pixels, groups, channels, c);
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < pixels; p++)
            for (int g = 0; g < groups; g++)
                for (int c = 0; c < channels; c += LANES) {
                    const struct lanes layer = lanes_at(mean, rstd, weight, bias, g, channels, c);
                    const vec scale = layer.weight * layer.rstd;
                    const vec mean_d = load(means + (g * 2) * channels + c), mean_hat = load(means + (g * 2 + 1) * channels + c);
                    const size_t at = ((size_t)p * n + g * rows) * channels + c;
                    for (int i = 0; i < rows; i++) {
                        const size_t here = at + (size_t)i * channels;
                        const struct passed at_x = pass_back(layer, x + here, dy + here, slope);
                        store(dx + here, scale * (at_x.d - mean_d - at_x.hat * mean_hat));
                    }
                }
    }
}

/* The gradient before a leaky ReLU from that after it and its output: dx = dy where y is above 0, slope dy elsewhere. */
EXPORT void dcgan32_leaky_backward(const float *y, const float *dy, float *dx, float slope, size_t count) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i += LANES) store(dx + i, through(load(dy + i), load(y + i), slope));
}
