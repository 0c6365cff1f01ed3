/* Few rows of activations: one pass over the codes, decoded in registers, sums in float32.

   Scales multiply sums, never weights. Nibbles come 128 columns a vector, without widening them: shifted by
   4 i bits, the lowest four bits of each lane are one column, and x is laid out to match. So the columns of
   a group are neighbouring lanes, and one multiplication by a vector of scales serves all groups of a
   block. Zen 4, one thread, 1536x576 in groups of 64: 36 us, and 78 us when
   each 32 nibbles were widened first. */

#pragma once
#include "decode.h"

/* out [m, n] = (x [m, k] - x_zero [m]) @ weight.T * x_scale [m] + bias [n] */
typedef struct {
    const weight *w;
    const void *x, *bias;          /* x: floats, or signed bytes for BYTES; bias may be NULL */
    const float *x_scale, *x_zero; /* may be NULL; x_zero for BYTES alone */
    void *out;
    int64_t m;
    enum type x_type, bias_type, out_type;
} job;

#define AT_ONCE 8   /* rows of x */
#define MOST_ROWS 4 /* weight rows */

#ifdef WIDE
/* x and weights as the multiplier takes them: 16 floats or 32 bfloat16. */
INLINE __m512 step(enum mode mode, __m512 sum, __m512i x, __m512i w) {
#ifdef PAIRS
    if (mode == HALVES) return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
#endif
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
}

/* The 16 levels of nibbles: floats, or 32 bfloat16 (twice the 16: five bits are looked at). */
INLINE __m512i level_table(enum mode mode, enum kind kind) {
    const __m512 levels = _mm512_loadu_ps(LEVELS[kind == NF4]);
#ifdef PAIRS
    if (mode == HALVES) return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(levels));
#endif
    return _mm512_castps_si512(levels);
}

INLINE __m512i look_up(enum mode mode, __m512i codes, __m512i table) {
    return mode == HALVES ? _mm512_permutexvar_epi16(codes, table) : _mm512_permutexvar_epi32(codes, table);
}

/* sums [ROWS, M] of M rows of x [M, kp] and the rows `c` of nibbles, whose scales are `s`. */
INLINE void nibble_dots(enum mode mode, const int ROWS, const int M, __m512i table, const uint8_t *x,
                        int64_t x_bytes, const uint8_t *const *c, const weight *w, const float *const *s,
                        __m512 *sums) {
    const int64_t size = w->groups == 1 ? up(w->k, 128) : w->group_size;
    const __m512i lane = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    const __m512i group = _mm512_srli_epi32(lane, size >= 128 ? 7 : size == 64 ? 6 : 5); /* in this block */
    const int64_t groups_a_block = size < 128 ? 128 / size : 0;
    int64_t g = 0, group_end = size;
    __m512 total[AT_ONCE];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS * M; ++i) total[i] = _mm512_setzero_ps();
    for (int64_t start = 0; start < w->k; start += 128, x += mode == HALVES ? 256 : 512) {
        if (size >= 128 && start == group_end) ++g, group_end += size;
        const int64_t bytes = (w->k - start + 1) / 2;
        const __mmask64 there = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
        __m512i codes[MOST_ROWS];
        __m512 part[AT_ONCE];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) codes[r] = _mm512_maskz_loadu_epi8(there, c[r] + start / 2);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS * M; ++i) part[i] = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int nibble = 0; nibble < (mode == HALVES ? 4 : 8); ++nibble)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const __m512i shifted = mode == HALVES ? _mm512_srli_epi16(codes[r], 4 * nibble)
                                                       : _mm512_srli_epi32(codes[r], 4 * nibble);
                const __m512i weights = look_up(mode, shifted, table);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const __m512i row = _mm512_load_si512(x + m * x_bytes + 64 * nibble);
                    part[r * M + m] = step(mode, part[r * M + m], row, weights);
                }
            }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const __m512 near = _mm512_broadcast_f32x4(_mm_loadu_ps(s[r] + g));
            const __m512 scale = _mm512_permutevar_ps(near, group);
#pragma GCC unroll 8
            for (int i = r * M; i < r * M + M; ++i) total[i] = _mm512_fmadd_ps(part[i], scale, total[i]);
        }
        g += groups_a_block;
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS * M; ++i) sums[i] = total[i];
}

/* The same for byte codes, 32 columns at a time, each group's sums scaled when it ends. */
INLINE void byte_dots(enum kind kind, enum mode mode, const int ROWS, const int M, const tables *t,
                      const uint8_t *x, int64_t x_bytes, const uint8_t *const *c, const weight *w,
                      const float *const *s, __m512 *sums) {
    const int64_t size = w->groups == 1 ? w->k : w->group_size;
    __m512 total[AT_ONCE];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS * M; ++i) total[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < w->groups; ++g) {
        const int64_t end = smaller((g + 1) * size, w->k);
        __m512 part[AT_ONCE];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS * M; ++i) part[i] = _mm512_setzero_ps();
        for (int64_t i = g * size; i < end; i += 32, x += mode == HALVES ? 64 : 128)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                __m512i weights[2];
                codes32(kind, mode, t, c[r] + i, end - i, weights);
#pragma GCC unroll 2
                for (int half = 0; half < (mode == HALVES ? 1 : 2); ++half)
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) {
                        const __m512i row = _mm512_load_si512(x + m * x_bytes + 64 * half);
                        part[r * M + m] = step(mode, part[r * M + m], row, weights[half]);
                    }
            }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int i = r * M; i < r * M + M; ++i)
                total[i] = _mm512_fmadd_ps(part[i], _mm512_set1_ps(s[r][g]), total[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS * M; ++i) sums[i] = total[i];
}

/* 4 vectors -> 4 sums. */
INLINE __m128 add_across(const __m512 *v) {
    const __m512 ab = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
    const __m512 cd = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
    const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    const __m512 four = low + high; /* each 128 bits hold a part of all four sums */
    const __m256 two = _mm512_castps512_ps256(four) + _mm512_extractf32x8_ps(four, 1);
    return _mm256_castps256_ps128(two) + _mm256_extractf128_ps(two, 1);
}

/* The sums [rows, M] of weight rows from `row` on. */
INLINE void few_dots(enum mode mode, const int ROWS, const int M, const job *j, const tables *t,
                     __m512i table, const uint8_t *x, int64_t x_bytes, const float *group_sums, int64_t row,
                     float *s, float *sums) {
    const weight *w = j->w;
    const int64_t room = padded(w->groups);
    const uint8_t *c[MOST_ROWS];
    const float *scales[MOST_ROWS];
    __m512 parts[AT_ONCE];
    for (int r = 0; r < ROWS; ++r) {
        const int64_t each = smaller(row + r, w->n - 1); /* past the end: the last one again */
        c[r] = w->codes + each * w->stride;
        scales[r] = s + 2 * r * room;
        row_scales(w, each, s + 2 * r * room, s + (2 * r + 1) * room);
    }
    prefetch(c[0], ROWS * w->stride);
    if (w->kind == INT8) byte_dots(INT8, mode, ROWS, M, t, x, x_bytes, c, w, scales, parts);
    else if (w->kind == FLOAT8) byte_dots(FLOAT8, mode, ROWS, M, t, x, x_bytes, c, w, scales, parts);
    else nibble_dots(mode, ROWS, M, table, x, x_bytes, c, w, scales, parts);
    for (int r = 0; w->zero_type != NONE && r < ROWS; ++r)
        for (int m = 0; m < M; ++m)
            for (int64_t g = 0; g < w->groups; g += 16)
                parts[r * M + m] =
                    _mm512_fmadd_ps(_mm512_loadu_ps(scales[r] + room + g),
                                    _mm512_loadu_ps(group_sums + m * room + g), parts[r * M + m]);
    for (int i = 0; i < ROWS * M; i += 4) _mm_storeu_ps(sums + i, add_across(parts + i));
}

INLINE int fast(const weight *w) {
    const int64_t size = w->group_size;
    if (w->groups == 1) return 1;
    return w->kind == INT8 ? size % 32 == 0 : size == 32 || size == 64 || size % 128 == 0;
}

/* A row of x in the order that its kind's dots ask for, zeros to the right. */
static void lay_out(const job *j, enum mode mode, int64_t row, uint8_t *restrict to) {
    const weight *w = j->w;
    const int64_t k = w->k, from = row * k;
    if (w->kind == INT8 || w->kind == FLOAT8) {
        if (mode == HALVES) memcpy(to, (const uint16_t *)j->x + from, k * 2);
        else
            for (int64_t i = 0; i < k; i += 32)
                activations32(w->kind, j->x, j->x_type, from + i, k - i, (__m512 *)(to + 4 * i),
                              (__m512 *)(to + 4 * i + 64));
        return;
    }
    for (int64_t start = 0; start < k; start += 128, to += mode == HALVES ? 256 : 512) {
        const int64_t count = smaller(k - start, 128);
        float wide[128] = {0};
        uint16_t halves[128] = {0};
        if (mode == HALVES) memcpy(halves, (const uint16_t *)j->x + from + start, count * 2);
        else widen(j->x, j->x_type, from + start, count, wide);
        for (int i = 0; mode == HALVES && i < 4; ++i)
            for (int lane = 0; lane < 32; ++lane) ((uint16_t *)to)[32 * i + lane] = halves[4 * lane + i];
        for (int i = 0; mode == FLOATS && i < 8; ++i)
            for (int lane = 0; lane < 16; ++lane) ((float *)to)[16 * i + lane] = wide[8 * lane + i];
    }
}
#else
INLINE int fast(const weight *w) { return 0; }
#endif

static void add_groups(const job *j, int64_t row, float *restrict sums) {
    const weight *w = j->w;
    for (int64_t g = 0; g < w->groups; ++g) {
        const int64_t end = smaller((g + 1) * w->group_size, w->k);
        float sum = 0;
        for (int64_t i = g * w->group_size; i < end; ++i) sum += at(j->x, j->x_type, row * w->k + i);
        sums[g] = sum;
    }
}

/* sums [count] of one row of x and weight rows from `first` on -> out. */
static void write_sums(const job *j, int64_t row, int64_t first, int64_t count, float *restrict sums) {
    const float scale = j->x_scale ? j->x_scale[row] : 1.0f;
    const int64_t to = row * j->w->n + first;
    if (j->x_scale)
        for (int64_t i = 0; i < count; ++i) sums[i] *= scale;
    if (j->bias && j->bias_type == BFLOAT16)
        for (int64_t i = 0; i < count; ++i) sums[i] += at(j->bias, BFLOAT16, first + i);
    else if (j->bias)
        for (int64_t i = 0; i < count; ++i) sums[i] += at(j->bias, FLOAT32, first + i);
    if (j->out_type == BFLOAT16)
        for (int64_t i = 0; i < count; ++i) ((uint16_t *)j->out)[to + i] = to_bfloat16(sums[i]);
    else memcpy((float *)j->out + to, sums, count * sizeof *sums);
}

/* All rows of x times the calling thread's weight rows, by any compiler: each is decoded first. */
static void few_plain(const job *j, int64_t first, int64_t last, float *restrict s, float *restrict decoded,
                      float *restrict sums) {
    const weight *w = j->w;
    for (int64_t row = first; row < last; ++row) {
        prefetch(w->codes + row * w->stride, w->stride);
        row_scales(w, row, s, s + padded(w->groups));
        decode_plain(w, row, s, s + padded(w->groups), decoded);
        for (int64_t m = 0; m < j->m; ++m) {
            float sum = 0;
            if (j->x_type == BFLOAT16)
                for (int64_t i = 0; i < w->k; ++i) sum += decoded[i] * at(j->x, BFLOAT16, m * w->k + i);
            else
                for (int64_t i = 0; i < w->k; ++i) sum += decoded[i] * at(j->x, FLOAT32, m * w->k + i);
            sums[m * w->n + row] = sum;
        }
    }
    for (int64_t m = 0; m < j->m; ++m) write_sums(j, m, first, last - first, sums + m * w->n + first);
}

#ifdef WIDE
/* The calling thread's weight rows [first, last) times `rows` rows of x from `start` on, laid out. */
#define FEW(MODE, ROWS, M)                                                             \
    for (int64_t row = first; row < last; row += ROWS) {                               \
        few_dots(MODE, ROWS, M, j, &t, table, x, x_bytes, group_sums, row, s, some);   \
        for (int r = 0; r < ROWS && row + r < last; ++r)                               \
            for (int m = 0; m < M; ++m) sums[m * j->w->n + row + r] = some[r * M + m]; \
    }
#define FEW_PART(NAME, MODE)                                                                                \
    static void NAME(const job *j, const uint8_t *x, int64_t x_bytes, const float *group_sums,              \
                     int64_t start, int64_t first, int64_t last, float *restrict s, float *restrict sums) { \
        const tables t = tables_of(j->w->kind);                                                             \
        const __m512i table = level_table(MODE, j->w->kind);                                                \
        const int64_t rows = smaller(j->m - start, AT_ONCE);                                                \
        float some[AT_ONCE];                                                                                \
        if (rows == 1) FEW(MODE, 4, 1)                                                                      \
        else if (rows == 2) FEW(MODE, 2, 2)                                                                 \
        else if (rows <= 4) FEW(MODE, 2, 4)                                                                 \
        else FEW(MODE, 1, 8)                                                                                \
        for (int64_t m = 0; m < rows; ++m)                                                                  \
            write_sums(j, start + m, first, last - first, sums + m * j->w->n + first);                      \
    }
FEW_PART(few_floats, FLOATS)
#ifdef PAIRS
FEW_PART(few_halves, HALVES)
#else
#define few_halves few_floats
#endif
#endif

/* Returns 0, or -1 if memory is short. */
static int few_rows(const job *j, enum mode mode, int threads) {
    const weight *w = j->w;
    const int64_t room = padded(w->groups), rows = up(j->m, AT_ONCE), kp = up(w->k, 128);
    const int64_t x_bytes = fast(w) ? kp * (mode == HALVES ? 2 : 4) : 0, own = 2 * MOST_ROWS * room + kp;
    uint8_t *x = scratch(rows * (x_bytes + (room + w->n) * 4) + threads * own * 4);
    if (!x) return -1;
    float *group_sums = (float *)(x + rows * x_bytes), *owned = group_sums + rows * room;
    float *sums = owned + threads * own; /* [rows, n]: each thread writes its columns */
#ifdef WIDE
    memset(x, 0, rows * (x_bytes + room * 4));
    for (int64_t row = 0; fast(w) && row < j->m; ++row) {
        lay_out(j, mode, row, x + row * x_bytes);
        if (w->zero_type != NONE) add_groups(j, row, group_sums + row * room);
    }
#endif
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num();
        const int64_t first = share(w->n, MOST_ROWS, thread), last = share(w->n, MOST_ROWS, thread + 1);
        float *s = owned + thread * own;
        memset(s, 0, 2 * MOST_ROWS * room * sizeof *s);
        if (!fast(w)) few_plain(j, first, last, s, s + 2 * MOST_ROWS * room, sums);
#ifdef WIDE
        else
            for (int64_t m = 0; m < j->m; m += AT_ONCE)
                (mode == HALVES ? few_halves : few_floats)(j, x + m * x_bytes, x_bytes, group_sums + m * room,
                                                           m, first, last, s, sums);
#endif
    }
    free(x);
    return 0;
}
