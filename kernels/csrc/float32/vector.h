/* What the files in this folder share.  Legend: N images, H x W pixels, C channels.
 *
 * The layers of ../dcgan.h in float32, for any x86 processor with AVX2 or AVX-512, over the same order of memory:
 * activations (H, W, N, C), the images of one pixel side by side, so that a pixel is a matrix (N, C).  Written in
 * gcc's vectors: which instructions they become is up to the compiler's flags alone.
 */
#ifndef VECTOR_H
#define VECTOR_H

#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* A product's block of sums, ROWS by two vectors, with what feeds it, fills the registers: 32 of 512 bits or 16 of 256. */
#ifdef __AVX512F__
#define LANES 16
#define ROWS 12
#else
#define LANES 8
#define ROWS 6
#endif
#define COLUMNS (2 * LANES)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vec load(const float *p) { return *(const anywhere *)p; }
static inline void store(float *p, vec x) { *(anywhere *)p = x; }
static inline vec choose(mask where, vec a, vec b) { return (vec)((where & (mask)a) | (~where & (mask)b)); }

/* Leaky ReLU; a NaN stays one, and with slope 0 minus infinity becomes one. */
static inline vec activated(vec z, float slope) { return choose(z < 0, z * slope, z); }

/* Its gradient: d where z is above 0 or NaN, slope d elsewhere. */
static inline vec through(vec d, vec z, float slope) { return choose(z <= 0, d * slope, d); }

/* LANES x LANES elements, in place: blocks of 1, 2, 4 .. change places across the diagonal. */
static inline void transpose(vec r[LANES]) {
    for (int size = 1; size < LANES; size *= 2)
        for (int i = 0; i < LANES; i++) {
            if (i & size) continue;
            mask low, high; /* lanes of the upper row, then from LANES on those of the lower one */
            for (int lane = 0; lane < LANES; lane++) {
                low[lane] = lane & size ? LANES + lane - size : lane;
                high[lane] = lane & size ? LANES + lane : lane + size;
            }
            const vec upper = r[i], lower = r[i + size];
            r[i] = __builtin_shuffle(upper, lower, low);
            r[i + size] = __builtin_shuffle(upper, lower, high);
        }
}

/* Floats for one thread, on a cache line of their own; NULL where there is no memory. */
static inline float *scratch(size_t count) { return aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64); }

/* c (rows, COLUMNS) = or += a (rows, k) b (k, COLUMNS); a's element (i, j) lies at i * row + j * step, b's row j at
 * j * b_row. */
__attribute__((always_inline)) static inline void block(const float *a, size_t row, size_t step, const float *b,
                                                        size_t b_row, float *c, size_t c_row, int k, int add,
                                                        const int rows) {
    vec sums[ROWS][2];
    for (int i = 0; i < rows; i++)
        for (int half = 0; half < 2; half++) sums[i][half] = add ? load(c + i * c_row + half * LANES) : (vec){0};
    for (int j = 0; j < k; j++, a += step, b += b_row) {
        const vec b0 = load(b), b1 = load(b + LANES);
        for (int i = 0; i < rows; i++) {
            sums[i][0] += a[i * row] * b0;
            sums[i][1] += a[i * row] * b1;
        }
    }
    for (int i = 0; i < rows; i++)
        for (int half = 0; half < 2; half++) store(c + i * c_row + half * LANES, sums[i][half]);
}

/* The same for so many rows: in blocks of ROWS, the last two of about one size. */
__attribute__((always_inline)) static inline void blocks(const float *a, size_t row, size_t step, const float *b,
                                                         size_t b_row, float *c, size_t c_row, int rows, int k, int add) {
    for (int i = 0, take; i < rows; i += take) {
        const int left = rows - i;
        take = left >= 2 * ROWS ? ROWS : left > ROWS ? (left + 1) / 2 : left;
        const float *from = a + i * row;
        float *to = c + i * c_row;
#define OF(n) \
    case n: block(from, row, step, b, b_row, to, c_row, k, add, n); break;
        switch (take) {
            OF(1) OF(2) OF(3) OF(4) OF(5) OF(6)
#if ROWS > 6
            OF(7) OF(8) OF(9) OF(10) OF(11) OF(12)
#endif
        }
#undef OF
    }
}

/* c = a b for a (rows, k), row by row in memory, and b's rows one behind the other. */
__attribute__((noinline, unused)) static void product(const float *a, size_t row, const float *b, float *c, size_t c_row,
                                                      int rows, int k) {
    blocks(a, row, 1, b, COLUMNS, c, c_row, rows, k, 0);
}

/* c += a^T b for a (k, rows) and b, both row by row in memory. */
__attribute__((noinline, unused)) static void add_transposed(const float *a, size_t a_row, const float *b, size_t b_row,
                                                             float *c, size_t c_row, int rows, int k) {
    blocks(a, 1, a_row, b, b_row, c, c_row, rows, k, 1);
}

#endif
