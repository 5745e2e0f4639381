/* Convolution and transposed convolution 4x4, stride 2, padding 1, in float32, with 9 products where plain ones take 16.
 *
 * One weight W (C_s, 4, 4, C_l) joins a small picture (H, W, N, C_s) and a large one (2H, 2W, N, C_l):
 *     down  small[h, w] = sum over kh, kw of large[2h - 1 + kh, 2w - 1 + kw] W[:, kh, kw, :]^T
 *     up    large[y, x] = sum over kh, kw of small[h, w] W[:, kh, kw, :]      where y = 2h - 1 + kh, x = 2w - 1 + kw
 *     grad  W[:, kh, kw, :] = sum over h, w of small[h, w]^T large[2h - 1 + kh, 2w - 1 + kw]
 * down is a convolution's forward pass and a transposed one's input gradient, up the other way round, grad both
 * gradients of the weight.
 *
 * Along one side, all three come apart into convolutions of stride 1 with two taps: taps of one parity see rows of one
 * parity only.  Two neighbouring outputs of such a one, of the rows d0, d1, d2 and the taps g0, g1, take three products
 * in place of four (Winograd 1980, "Arithmetic Complexity of Computations"; Lavin and Gray 2016, "Fast Algorithms for
 * Convolutional Neural Networks", section 4, F(2, 2)):
 *     m0 = (d0 - d1) g0,  m1 = d1 (g0 + g1),  m2 = (d2 - d1) g1;   d0 g0 + d1 g1 = m0 + m1,   d1 g0 + d2 g1 = m1 + m2
 * and along both sides 9 in place of 16.  No number grows by more than sums of four, so little is lost to rounding.  In
 * this order of memory a d is a whole matrix (N, C): the sums are vectors' sums, the products those of matrices.
 *
 * Each element is summed in one order, so results do not depend on the number of threads.
 */
#include "vector.h"

#define POINTS 3 /* products along one side */
#define PAD 16   /* floats between rows of scratch, which else lie a multiple of 4096 bytes apart */

#define IMAGES_AT_ONCE 128 /* their scratch, and the part of the weight beside it, are to stay in the second-level cache */
#define FEWEST_IMAGES 16   /* below which a product has too few rows for its weight */

/* Images at a time, of n: fewer where there would else be less than two pieces of work for each thread. */
static int images_at_once(int n, int tiles) {
    int images = MIN(n, IMAGES_AT_ONCE);
    while (images > FEWEST_IMAGES && tiles * ((n + images - 1) / images) < 2 * omp_get_max_threads())
        images = (images + 1) / 2;
    return images;
}

/* A pixel's matrix (images, C); beyond the picture, one line of zeros again and again. */
struct pixel {
    const float *at;
    size_t row;
};

struct picture {
    const float *x, *zeros;
    int height, width, n, channels;
};

static inline struct pixel pixel_at(const struct picture *p, int y, int x, int first) {
    if (y < 0 || y >= p->height || x < 0 || x >= p->width) return (struct pixel){p->zeros, 0};
    const size_t pixel = (size_t)y * p->width + x;
    return (struct pixel){p->x + (pixel * p->n + first) * p->channels, p->channels};
}

/* Along one side of a sum: a line of pixels, and one that is added or taken away, or NONE. */
#define NONE INT32_MIN
struct lines {
    int first, second;
};

/* Where a sum goes: element (image i, channel c) to i * row + c / COLUMNS * panel + c % COLUMNS. */
struct place {
    float *to;
    size_t row, panel;
};

__attribute__((always_inline)) static inline void sum_pixels(const struct pixel p[2][2], float sign, int images,
                                                             int channels, struct place place, const int ys, const int xs) {
    for (int i = 0; i < images; i++) {
        const float *at[2][2];
        for (int y = 0; y < ys; y++)
            for (int x = 0; x < xs; x++) at[y][x] = p[y][x].at + i * p[y][x].row;
        float *to = place.to + i * place.row;
        for (int c = 0; c < channels; c += COLUMNS, to += place.panel)
            for (int half = 0; half < COLUMNS; half += LANES) {
                vec sum = load(at[0][0] + c + half);
                if (ys == 2) sum += sign * load(at[1][0] + c + half);
                if (xs == 2) {
                    vec other = load(at[0][1] + c + half);
                    if (ys == 2) other += sign * load(at[1][1] + c + half);
                    sum += sign * other;
                }
                store(to + half, sum);
            }
    }
}

/* The sum over both sides: first + sign second along y, and of that the same along x. */
static void combine(const struct picture *p, struct lines y, struct lines x, float sign, int first, int images,
                    int channels, struct place place) {
    const int ys = y.second == NONE ? 1 : 2, xs = x.second == NONE ? 1 : 2;
    struct pixel pixels[2][2];
    for (int i = 0; i < ys; i++)
        for (int j = 0; j < xs; j++)
            pixels[i][j] = pixel_at(p, i ? y.second : y.first, j ? x.second : x.first, first);
    if (ys == 1 && xs == 1) sum_pixels(pixels, sign, images, channels, place, 1, 1);
    else if (ys == 1) sum_pixels(pixels, sign, images, channels, place, 1, 2);
    else if (xs == 1) sum_pixels(pixels, sign, images, channels, place, 2, 1);
    else sum_pixels(pixels, sign, images, channels, place, 2, 2);
}

/* d0 - d1, d1, d2 - d1, where d0 is line `start` and the next ones come `step` later. */
static inline struct lines of_input(int start, int step, int point) {
    const int d1 = start + step;
    return point == 0 ? (struct lines){start, d1} : point == 1 ? (struct lines){d1, NONE} : (struct lines){d1 + step, d1};
}

/* What multiplies them along one side: six sums of the four taps, for `down` by parity of the tap, for `up` by parity of
 * the output.  Of `up`, the second one's first is negative: it goes with d2 - d1 of the first, which is its d1 - d0. */
static const float OF_DOWN[6][4] = {{1, 0, 0, 0}, {1, 0, 1, 0}, {0, 0, 1, 0}, {0, 1, 0, 0}, {0, 1, 0, 1}, {0, 0, 0, 1}};
static const float OF_UP[6][4] = {{0, 0, 0, 1}, {0, 1, 0, 1}, {0, 1, 0, 0}, {0, 0, -1, 0}, {1, 0, 1, 0}, {1, 0, 0, 0}};

/* The 36 sums of one vector of all 16 taps, which lie cl apart. */
static inline void transformed(const float *w, int cl, const float table[6][4], vec out[6][6]) {
    vec rows[6][4];
    for (int i = 0; i < 6; i++)
        for (int kw = 0; kw < 4; kw++) {
            rows[i][kw] = (vec){0};
            for (int kh = 0; kh < 4; kh++)
                if (table[i][kh] != 0) rows[i][kw] += table[i][kh] * load(w + (kh * 4 + kw) * cl);
        }
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < 6; j++) {
            out[i][j] = (vec){0};
            for (int kw = 0; kw < 4; kw++)
                if (table[j][kw] != 0) out[i][j] += table[j][kw] * rows[i][kw];
        }
}

/* W (cs, 16, cl) for `down`: [9 points][cs / COLUMNS][4 parities of the tap x cl][COLUMNS]. */
EXPORT void dcgan32_pack_down(const float *w, float *packed, int cs, int cl) {
    const int panels = cs / COLUMNS;
#pragma omp parallel for collapse(2) schedule(static)
    for (int panel = 0; panel < panels; panel++)
        for (int c = 0; c < cl; c += LANES)
            for (int s = 0; s < COLUMNS; s += LANES) {
                vec sums[6][6][LANES];
                for (int i = 0; i < LANES; i++) {
                    vec of_row[6][6];
                    transformed(w + (size_t)(panel * COLUMNS + s + i) * 16 * cl + c, cl, OF_DOWN, of_row);
                    for (int j = 0; j < 36; j++) sums[j / 6][j % 6][i] = of_row[j / 6][j % 6];
                }
                for (int i = 0; i < 6; i++)
                    for (int j = 0; j < 6; j++) {
                        const int parity = i / POINTS * 2 + j / POINTS, point = i % POINTS * POINTS + j % POINTS;
                        float *to = packed + (((size_t)point * panels + panel) * 4 * cl + parity * cl + c) * COLUMNS + s;
                        transpose(sums[i][j]);
                        for (int lane = 0; lane < LANES; lane++) store(to + lane * COLUMNS, sums[i][j][lane]);
                    }
            }
}

/* W (cs, 16, cl) for `up`: [2 x 3][2 x 3: parity of the output, point][cl / COLUMNS][cs][COLUMNS]. */
EXPORT void dcgan32_pack_up(const float *w, float *packed, int cs, int cl) {
    const int panels = cl / COLUMNS;
#pragma omp parallel for schedule(static)
    for (int s = 0; s < cs; s++)
        for (int c = 0; c < cl; c += LANES) {
            vec sums[6][6];
            transformed(w + (size_t)s * 16 * cl + c, cl, OF_UP, sums);
            for (int i = 0; i < 36; i++)
                store(packed + (((size_t)i * panels + c / COLUMNS) * cs + s) * COLUMNS + c % COLUMNS, sums[i / 6][i % 6]);
        }
}

/* One thread's scratch: a line of zeros, and two pieces whose sizes are whole cache lines.  NULL: there is no memory. */
struct work {
    float *zeros, *one, *two;
};

static struct work begin(size_t zeros, size_t one, size_t two) {
    float *all = scratch(zeros + one + two);
    if (!all) return (struct work){NULL, NULL, NULL};
    memset(all, 0, zeros * sizeof(float));
    return (struct work){all, all + zeros, all + zeros + one};
}

/* Where outputs go: of every small pixel one, or, of the large picture, that of one parity. */
struct outputs {
    float *x;
    int height, width, step, odd_y, odd_x, n, channels;
};

/* Two by two outputs, from small pixel (h, w) on, out of nine products (images, channels): m0 + m1 and m1 + m2 along both
 * sides.  Those beyond the picture are left out. */
static void put_outputs(const float *products, size_t product, const struct outputs *to, int h, int w, int first,
                        int images) {
    const int channels = to->channels;
    float *out[2][2];
    for (int i = 0; i < 4; i++) {
        const int y = h + i / 2, x = w + i % 2;
        const size_t at = (size_t)(to->step * y + to->odd_y) * to->step * to->width + to->step * x + to->odd_x;
        out[i / 2][i % 2] = y < to->height && x < to->width ? to->x + (at * to->n + first) * channels : NULL;
    }
    for (int i = 0; i < images; i++)
        for (int c = 0; c < channels; c += LANES) {
            const float *m = products + (size_t)i * channels + c;
            vec rows[2][POINTS];
            for (int x = 0; x < POINTS; x++) {
                const vec middle = load(m + (POINTS + x) * product);
                rows[0][x] = load(m + x * product) + middle;
                rows[1][x] = middle + load(m + (2 * POINTS + x) * product);
            }
            for (int y = 0; y < 2; y++)
                for (int x = 0; x < 2; x++)
                    if (out[y][x]) store(out[y][x] + (size_t)i * channels + c, rows[y][x] + rows[y][x + 1]);
        }
}

/* (2 height, 2 width, n, cl) -> (height, width, n, cs).  Not 0: there was no memory. */
EXPORT int dcgan32_down(const float *large, const float *packed, float *small, int height, int width, int n, int cs,
                        int cl) {
    const int at_once = images_at_once(n, (height + 1) / 2 * ((width + 1) / 2)), k = 4 * cl, panels = cs / COLUMNS;
    const size_t row = k + PAD, product_size = (size_t)at_once * cs + PAD;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        const struct work work = begin(cl, at_once * row, 9 * product_size);
        float *sums = work.one, *products = work.two;
        failed |= !work.zeros;
        const struct picture from = {large, work.zeros, 2 * height, 2 * width, n, cl};
        const struct outputs to = {small, height, width, 1, 0, 0, n, cs};
#pragma omp for collapse(3) schedule(static)
        for (int first = 0; first < n; first += at_once)
            for (int h = 0; h < height; h += 2)
                for (int w = 0; w < width; w += 2) {
                    if (!work.zeros) continue;
                    const int images = MIN(at_once, n - first);
                    for (int point = 0; point < 9; point++) {
                        for (int parity = 0; parity < 4; parity++)
                            combine(&from, of_input(2 * h - 1 + parity / 2, 2, point / POINTS),
                                    of_input(2 * w - 1 + parity % 2, 2, point % POINTS), -1, first, images, cl,
                                    (struct place){sums + parity * cl, row, COLUMNS});
                        for (int panel = 0; panel < panels; panel++)
                            product(sums, row, packed + ((size_t)point * panels + panel) * k * COLUMNS,
                                    products + point * product_size + panel * COLUMNS, cs, images, k);
                    }
                    put_outputs(products, product_size, &to, h, w, first, images);
                }
        free(work.zeros);
    }
    return failed;
}

/* (height, width, n, cs) -> (2 height, 2 width, n, cl).  Not 0: there was no memory. */
EXPORT int dcgan32_up(const float *small, const float *packed, float *large, int height, int width, int n, int cs, int cl) {
    const int at_once = images_at_once(n, (height + 1) / 2 * ((width + 1) / 2) * 2), panels = cl / COLUMNS;
    const size_t row = cs + PAD, product_size = (size_t)at_once * cl + PAD;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        const struct work work = begin(cs, at_once * row, 18 * product_size);
        float *sums = work.one, *products = work.two;
        failed |= !work.zeros;
        const struct picture from = {small, work.zeros, height, width, n, cs};
#pragma omp for collapse(4) schedule(static)
        for (int first = 0; first < n; first += at_once)
            for (int h = 0; h < height; h += 2)
                for (int w = 0; w < width; w += 2)
                    for (int odd_y = 0; odd_y < 2; odd_y++) {
                        if (!work.zeros) continue;
                        const int images = MIN(at_once, n - first);
                        /* Along x: outputs of both parities, whose five different sums are each made once. */
                        for (int y = 0; y < POINTS; y++)
                            for (int x = 0; x < 5; x++) {
                                const struct lines across = of_input(x < 3 ? w - 1 : w, 1, x < 3 ? x : x - 2);
                                const struct lines down = of_input(h - 1 + odd_y, 1, y);
                                const int negative = odd_y && y == 0; /* this sum is that of the other parity */
                                combine(&from, negative ? (struct lines){down.second, down.first} : down, across, -1, first,
                                        images, cs, (struct place){sums, row, COLUMNS});
                                for (int odd_x = x > 2; odd_x <= (x >= 2); odd_x++)
                                    for (int panel = 0; panel < panels; panel++) {
                                        const int point = x - 2 * odd_x;
                                        const size_t part = (odd_y * POINTS + y) * 6 + odd_x * POINTS + point;
                                        product(sums, row, packed + (part * panels + panel) * cs * COLUMNS,
                                                products + (odd_x * 9 + y * POINTS + point) * product_size + panel * COLUMNS,
                                                cl, images, cs);
                                    }
                            }
                        for (int odd_x = 0; odd_x < 2; odd_x++) {
                            const struct outputs to = {large, height, width, 2, odd_y, odd_x, n, cl};
                            put_outputs(products + odd_x * 9 * product_size, product_size, &to, h, w, first, images);
                        }
                    }
        free(work.zeros);
    }
    return failed;
}

/* Channels of the small picture at a time: as many as leave the sums of nine products in the second-level cache, and few
 * enough that every thread has a share. */
static int channels_at_once(int cs, int cl) {
    const int panels = cs / COLUMNS, most = MAX(1, (1280 << 10) / (9 * cl * COLUMNS * (int)sizeof(float)));
    int parts = (panels + most - 1) / most;
    while (parts < panels && 4 * parts < 2 * omp_get_max_threads()) parts++;
    return (panels + parts - 1) / parts * COLUMNS;
}

/* W (cs, 16, cl) from small and large.  `sums`: 36 * cs * cl of scratch.  Not 0: there was no memory.
 *
 * Along one side and for one parity of the taps: dw0 = sum of d0 g0 + d1 g1, dw1 = sum of d1 g0 + d2 g1 over the large
 * picture's d and the small one's g, by the same three products. */
EXPORT int dcgan32_grad(const float *small, const float *large, float *grad, float *sums, int height, int width, int n,
                        int cs, int cl) {
    const int at_once = MIN(n, IMAGES_AT_ONCE), most = channels_at_once(cs, cl), parts = (cs + most - 1) / most;
    static const struct lines OF_SMALL[POINTS] = {{0, NONE}, {0, 1}, {1, NONE}};
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        const size_t row = most + PAD, product = (size_t)cs * cl;
        const struct work work = begin(MAX(cs, cl), at_once * row, (size_t)at_once * cl);
        float *of_small = work.one, *of_large = work.two;
        failed |= !work.zeros;
        const struct picture from = {large, work.zeros, 2 * height, 2 * width, n, cl};
#pragma omp for collapse(2) schedule(static)
        for (int parity = 0; parity < 4; parity++)
            for (int part = 0; part < parts; part++) {
                if (!work.zeros) continue;
                const int channels = MIN(most, cs - part * most);
                const struct picture to = {small + part * most, work.zeros, height, width, n, cs};
                float *sum = sums + parity * 9 * product + (size_t)part * most * cl;
                for (int point = 0; point < 9; point++)
                    memset(sum + point * product, 0, (size_t)channels * cl * sizeof(float));
                for (int first = 0; first < n; first += at_once)
                    for (int h = 0; h < height; h += 2)
                        for (int w = 0; w < width; w += 2)
                            for (int point = 0; point < 9; point++) {
                                const int images = MIN(at_once, n - first), y = point / POINTS, x = point % POINTS;
                                const struct lines ys = OF_SMALL[y], xs = OF_SMALL[x];
                                combine(&from, of_input(2 * h - 1 + parity / 2, 2, y), of_input(2 * w - 1 + parity % 2, 2, x),
                                        -1, first, images, cl, (struct place){of_large, COLUMNS, (size_t)images * COLUMNS});
                                combine(&to, (struct lines){h + ys.first, ys.second == NONE ? NONE : h + ys.second},
                                        (struct lines){w + xs.first, xs.second == NONE ? NONE : w + xs.second}, 1, first,
                                        images, channels, (struct place){of_small, row, COLUMNS});
                                for (int c = 0; c < cl; c += COLUMNS)
                                    add_transposed(of_small, row, of_large + (size_t)c * images, COLUMNS,
                                                   sum + point * product + c, cl, channels, images);
                            }
            }
        free(work.zeros);
#pragma omp for collapse(2) schedule(static)
        for (int s = 0; s < cs; s++)
            for (int tap = 0; tap < 16; tap++) {
                const int parity = tap / 4 % 2 * 2 + tap % 2, y = tap / 8, x = tap % 4 / 2;
                const size_t product = (size_t)cs * cl;
                const float *m = sums + (parity * 9 + y * POINTS + x) * product + (size_t)s * cl;
                for (int c = 0; c < cl; c += LANES)
                    store(grad + ((size_t)s * 16 + tap) * cl + c,
                          (load(m + c) + load(m + product + c)) +
                              (load(m + POINTS * product + c) + load(m + (POINTS + 1) * product + c)));
            }
    }
    return failed;
}
