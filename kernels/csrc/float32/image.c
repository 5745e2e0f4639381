/* The ends of both networks, where one side of a 4x4, stride 2, padding 1 convolution is a picture of 1 to 4 channels.
 *
 * The picture is (N, 2H, 2W, C), as networks' callers hold it; the other side (H, W, N, C_s).  The 16 C numbers under a
 * pixel are laid side by side and used at once: with a few hundred images they do not leave the second-level cache.
 *     down  from the picture: D's first layer, with its LeakyReLU, and the input gradient of G's last
 *     up    to the picture: G's last layer, and the input gradient of D's first
 *     grad  the weight's gradient of either
 */
#include "vector.h"

/* Those numbers and what fills them up to whole COLUMNS; at most 64. */
static inline int width_of(int c) { return (16 * c + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* W (cs, 16 c) for `down`: [cs / COLUMNS][16 c][COLUMNS]. */
EXPORT void dcgan32_image_pack_down(const float *w, float *packed, int cs, int c) {
    for (int s = 0; s < cs; s++)
        for (int k = 0; k < 16 * c; k++)
            packed[((size_t)(s / COLUMNS) * 16 * c + k) * COLUMNS + s % COLUMNS] = w[s * 16 * c + k];
}

/* W (cs, 16 c) for `up`: [width / COLUMNS][cs][COLUMNS]. */
EXPORT void dcgan32_image_pack_up(const float *w, float *packed, int cs, int c) {
    for (int s = 0; s < cs; s++)
        for (int k = 0; k < width_of(c); k++)
            packed[((size_t)(k / COLUMNS) * cs + s) * COLUMNS + k % COLUMNS] = k < 16 * c ? w[s * 16 * c + k] : 0;
}

/* Of the 4 c numbers of a row under small pixel w: the first that lies in the picture, and the one after the last. */
struct part {
    int first, end;
};

static inline struct part part_of_row(int w, int width, int c) {
    return (struct part){w == 0 ? c : 0, w == width - 1 ? 3 * c : 4 * c};
}

/* What lies under small pixel (h, w) in every picture: image i's 16 c numbers at i * row. */
__attribute__((always_inline)) static inline void columns_of(const float *images, float *out, size_t row, int h, int w,
                                                             int height, int width, int n, const int c) {
    const struct part part = part_of_row(w, width, c);
    for (int i = 0; i < n; i++)
        for (int kh = 0; kh < 4; kh++) {
            const int y = 2 * h - 1 + kh;
            const float *from = images + (((ptrdiff_t)i * 2 * height + y) * 2 * width + 2 * w - 1) * c;
            float *to = out + i * row + kh * 4 * c;
            if (y < 0 || y >= 2 * height)
                for (int j = 0; j < 4 * c; j++) to[j] = 0;
            else if (part.first == 0 && part.end == 4 * c) /* most of them: its length is known to the compiler */
                for (int j = 0; j < 4 * c; j++) to[j] = from[j];
            else
                for (int j = 0; j < 4 * c; j++) to[j] = j >= part.first && j < part.end ? from[j] : 0;
        }
}

static void columns(const float *images, float *out, size_t row, int h, int w, int height, int width, int n, int c) {
    switch (c) {
        case 1: columns_of(images, out, row, h, w, height, width, n, 1); break;
        case 2: columns_of(images, out, row, h, w, height, width, n, 2); break;
        case 3: columns_of(images, out, row, h, w, height, width, n, 3); break;
        default: columns_of(images, out, row, h, w, height, width, n, 4);
    }
}

/* Images (n, 2 height, 2 width, c) -> (height, width, n, cs), through a leaky ReLU of this slope; 1: none.
 * Not 0: there was no memory. */
EXPORT int dcgan32_image_down(const float *images, const float *packed, float *out, float slope, int height, int width,
                              int n, int cs, int c) {
    const int k = 16 * c;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *under = scratch((size_t)n * k);
        failed |= !under;
#pragma omp for schedule(static)
        for (int p = 0; p < height * width; p++) {
            if (!under) continue;
            columns(images, under, k, p / width, p % width, height, width, n, c);
            float *to = out + (size_t)p * n * cs;
            for (int panel = 0; panel < cs / COLUMNS; panel++)
                product(under, k, packed + (size_t)panel * k * COLUMNS, to + panel * COLUMNS, cs, n, k);
            if (slope != 1)
                for (size_t i = 0; i < (size_t)n * cs; i += LANES) store(to + i, activated(load(to + i), slope));
        }
        free(under);
    }
    return failed;
}

/* Images at a time, whose pictures stay in the second-level cache. */
#define IMAGES_AT_ONCE 12

/* (height, width, n, cs) -> images (n, 2 height, 2 width, c).  Not 0: there was no memory. */
EXPORT int dcgan32_image_up(const float *small, const float *packed, float *images, int height, int width, int n, int cs,
                            int c) {
    int failed = 0;
    const int row = width_of(c);
    const int threads = omp_get_max_threads();
    const int parts = (n + threads * IMAGES_AT_ONCE - 1) / (threads * IMAGES_AT_ONCE) * threads, at_once = (n + parts - 1) / parts;
    const size_t line = (size_t)2 * width * c, image = 2 * height * line;
#pragma omp parallel reduction(| : failed)
    {
        float *under = scratch((size_t)at_once * row);
        failed |= !under;
#pragma omp for schedule(static)
        for (int part = 0; part < parts; part++) {
            const int first = part * at_once, count = MIN(at_once, n - first);
            if (!under || count <= 0) continue;
            memset(images + first * image, 0, count * image * sizeof(float));
            for (int p = 0; p < height * width; p++) {
                const int h = p / width, w = p % width;
                const struct part of_row = part_of_row(w, width, c);
                for (int k = 0; k < row; k += COLUMNS)
                    product(small + ((size_t)p * n + first) * cs, cs, packed + (size_t)k * cs, under + k, row, count, cs);
                for (int i = 0; i < count; i++)
                    for (int kh = 0; kh < 4; kh++) {
                        const int y = 2 * h - 1 + kh;
                        if (y < 0 || y >= 2 * height) continue;
                        float *to = images + (first + i) * image + y * line + (2 * w - 1) * c;
                        for (int j = of_row.first; j < of_row.end; j++) to[j] += under[i * row + kh * 4 * c + j];
                    }
            }
        }
        free(under);
    }
    return failed;
}

/* W (cs, 4, 4, c) from small (height, width, n, cs) and images (n, 2 height, 2 width, c).
 * `partial`: height * cs * 64 of scratch, a sum for each row of pixels, so that the order of adding is fixed.
 * Not 0: there was no memory. */
EXPORT int dcgan32_image_grad(const float *small, const float *images, float *grad, float *partial, int height, int width,
                              int n, int cs, int c) {
    const int row = width_of(c);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *under = scratch((size_t)n * row);
        failed |= !under;
        if (under) memset(under, 0, (size_t)n * row * sizeof(float)); /* what fills up a row stays so */
#pragma omp for schedule(static)
        for (int h = 0; h < height; h++) {
            if (!under) continue;
            float *sum = partial + (size_t)h * cs * row;
            memset(sum, 0, (size_t)cs * row * sizeof(float));
            for (int w = 0; w < width; w++) {
                columns(images, under, row, h, w, height, width, n, c);
                for (int k = 0; k < row; k += COLUMNS)
                    add_transposed(small + (size_t)(h * width + w) * n * cs, cs, under + k, row, sum + k, row, cs, n);
            }
        }
        free(under);
#pragma omp for schedule(static)
        for (int s = 0; s < cs; s++)
            for (int k = 0; k < 16 * c; k++) {
                float sum = 0;
                for (int h = 0; h < height; h++) sum += partial[((size_t)h * cs + s) * row + k];
                grad[s * 16 * c + k] = sum;
            }
    }
    return failed;
}
