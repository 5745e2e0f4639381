/* What BatchNorm makes of its sums over pixels, one channel at a time, in float64 and in one order: for both libraries.
 *
 * `partial` holds for each pixel and group two sums a channel, float32: [pixels][groups][2][channels].
 */
#ifndef BATCHNORM_SUMS_H
#define BATCHNORM_SUMS_H

#include <math.h>
#include <stddef.h>

struct sums {
    double first, second;
};

static inline struct sums over_pixels(const float *partial, int pixels, int groups, int group, int channels, int channel) {
    struct sums found = {0, 0};
    for (int p = 0; p < pixels; p++) {
        const float *from = partial + ((size_t)p * groups + group) * 2 * channels + channel;
        found.first += from[0];
        found.second += from[channels];
    }
    return found;
}

/* From sums of x - about and of its square over `count` numbers: mean and 1 / deviation of one group.  The running ones,
 * where there are any, are moved by momentum; their variance is the unbiased one. */
static inline void statistics(struct sums sums, double about, double count, double eps, double momentum, float *mean,
                              float *rstd, float *running_mean, float *running_var) {
    const double off = sums.first / count, raw = sums.second / count - off * off, variance = raw < 0 ? 0 : raw;
    *mean = (float)(about + off);
    *rstd = (float)(1 / sqrt(variance + eps));
    if (running_mean) {
        *running_mean = (float)((1 - momentum) * *running_mean + momentum * (about + off));
        *running_var = (float)((1 - momentum) * *running_var + momentum * variance * count / (count - 1));
    }
}

/* From sums of dy and of dy x_hat: the gradients of bias and weight over all groups, and each group's means, [groups][2]
 * [channels]. */
static inline void gradients(const float *partial, double count, float *dweight, float *dbias, float *means, int pixels,
                             int groups, int channels, int channel) {
    double all = 0, all_hat = 0;
    for (int g = 0; g < groups; g++) {
        const struct sums sums = over_pixels(partial, pixels, groups, g, channels, channel);
        means[(g * 2) * channels + channel] = (float)(sums.first / count);
        means[(g * 2 + 1) * channels + channel] = (float)(sums.second / count);
        all += sums.first;
        all_hat += sums.second;
    }
    dbias[channel] = (float)all;
    dweight[channel] = (float)all_hat;
}

#endif
