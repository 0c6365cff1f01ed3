/* Many rows of activations on vectors of 16: lanes are rows of x.

   x is turned once a call: 16 rows side by side, a lane holding 32 bits of each: one float32, a pair of
   bfloat16 or four bytes. A block of weight rows is decoded into the cache, and each of its 32-bit units is
   broadcast against x: no weight is turned, and the codes are read once. Tiles of 24 sums keep the
   multiplier busy. Zen 4, one core: 235 GFLOP/s in bfloat16, the peak; F.linear reaches 195. */

#pragma once
#include "few.h"

#ifdef WIDE
#define BLOCK 48         /* weight rows decoded at a time */
#define UNITS 1024       /* of each: with x they stay in the second-level cache */
#define ROWS_AT_ONCE 256 /* of x: bounds the copy of it */

/* sums [NR, MR * 16] of MR vectors of x, `xs` units apart, and NR weight rows, `ws` units apart. */
#define TILE(NAME, MODE, MR, NR)                                                                     \
    static void NAME(const uint32_t *restrict x, int64_t xs, const uint32_t *restrict w, int64_t ws, \
                     int64_t units, float *restrict sums, int64_t stride, int more) {                \
        __m512 acc[NR][MR];                                                                          \
        _Pragma("GCC unroll 24") for (int j = 0; j < NR; ++j)                                        \
            _Pragma("GCC unroll 4") for (int i = 0; i < MR; ++i) acc[j][i] =                         \
                more ? _mm512_load_ps(sums + j * stride + 16 * i) : _mm512_setzero_ps();             \
        for (int64_t p = 0; p < units; ++p) {                                                        \
            __m512i v[MR];                                                                           \
            _Pragma("GCC unroll 4") for (int i = 0; i < MR; ++i) v[i] =                              \
                _mm512_load_si512(x + i * xs + p * 16);                                              \
            _Pragma("GCC unroll 24") for (int j = 0; j < NR; ++j) {                                  \
                const __m512i unit = _mm512_set1_epi32((int32_t)w[j * ws + p]);                      \
                _Pragma("GCC unroll 4") for (int i = 0; i < MR; ++i) acc[j][i] =                     \
                    step(MODE, acc[j][i], v[i], unit);                                               \
            }                                                                                        \
        }                                                                                            \
        _Pragma("GCC unroll 24") for (int j = 0; j < NR; ++j)                                        \
            _Pragma("GCC unroll 4") for (int i = 0; i < MR; ++i)                                     \
                _mm512_store_ps(sums + j * stride + 16 * i, acc[j][i]);                              \
    }
typedef void tile(const uint32_t *, int64_t, const uint32_t *, int64_t, int64_t, float *, int64_t, int);
TILE(floats_1, FLOATS, 1, 24)
TILE(floats_2, FLOATS, 2, 12)
#ifdef PAIRS
TILE(halves_1, HALVES, 1, 24)
TILE(halves_2, HALVES, 2, 12)
#define TILE_OF(MODE, MR) (MODE == HALVES ? MR == 2 ? halves_2 : halves_1 : MR == 2 ? floats_2 : floats_1)
#else
#define TILE_OF(MODE, MR) (MR == 2 ? floats_2 : floats_1)
#endif

/* 16 vectors of 16 lanes, turned: four perfect shuffles. */
INLINE void turn(__m512i *v) {
    __m512i o[16];
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 2
    for (int twice = 0; twice < 2; ++twice) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            o[2 * i] = _mm512_permutex2var_epi32(v[i], low, v[i + 8]);
            o[2 * i + 1] = _mm512_permutex2var_epi32(v[i], high, v[i + 8]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            v[2 * i] = _mm512_permutex2var_epi32(o[i], low, o[i + 8]);
            v[2 * i + 1] = _mm512_permutex2var_epi32(o[i], high, o[i + 8]);
        }
    }
}

/* 16 rows of x from `row` on -> [units, 16], zeros where there are none; bytes are moved up by 128. */
static void pack(const job *j, enum mode mode, int64_t row, uint32_t *restrict to) {
    const int64_t k = j->w->k, rows = smaller(j->m - row, 16), columns = mode == BYTES ? 64 : 32;
    for (int64_t first = 0; first < k; first += columns, to += mode == FLOATS ? 512 : 256) {
        __m512i a[16], b[16];
        const int64_t left = k - first;
        for (int i = 0; i < 16; ++i) {
            const int64_t from = (row + i) * k + first;
            a[i] = b[i] = _mm512_setzero_si512();
            if (i >= rows) continue;
            if (mode == HALVES) {
                const __mmask32 there = left >= 32 ? 0xffffffff : (1u << left) - 1;
                a[i] = _mm512_maskz_loadu_epi16(there, (const uint16_t *)j->x + from);
            } else if (mode == BYTES) {
                const __mmask64 there = left >= 64 ? ~0ull : (1ull << left) - 1;
                const __m512i bytes = _mm512_maskz_loadu_epi8(there, (const uint8_t *)j->x + from);
                a[i] = _mm512_xor_si512(bytes, _mm512_maskz_set1_epi8(there, -128));
            } else activations32(j->w->kind, j->x, j->x_type, from, left, (__m512 *)&a[i], (__m512 *)&b[i]);
        }
        turn(a);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 16, a[i]);
        if (mode != FLOATS) continue;
        turn(b);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 256 + i * 16, b[i]);
    }
}

/* Columns [from, from + 32) of a row in units, scaled by `scale` and with `added`, unless `exact`. */
INLINE void block32(enum kind kind, enum mode mode, const tables *t, const __m512i *table, int exact,
                    float scale, const uint8_t *c, int64_t count, uint32_t *restrict to) {
#ifdef PAIRS
    if (mode == HALVES) {
        if (kind == INT4) {
            const __mmask16 there = count >= 32 ? 0xffff : (__mmask16)((1u << (count + 1) / 2) - 1);
            const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, c));
            const __m512i both = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
            _mm512_store_si512(to, _mm512_permutexvar_epi16(both, *table)); /* looks at five bits */
            return;
        }
    }
    if (kind != INT4 && exact) {
        codes32(kind, mode, t, c, count, (__m512i *)to);
        return;
    }
#endif
    __m512 a, b;
    floats32(kind, t, c, count, &a, &b);
    if (kind != INT4 && !exact) {
        a *= _mm512_set1_ps(scale);
        b *= _mm512_set1_ps(scale);
    }
#ifdef PAIRS
    if (mode == HALVES) {
        _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        return;
    }
#endif
    _mm512_store_ps(to, a);
    _mm512_store_ps(to + 16, b);
}

/* Columns [from, to) of a row, whole blocks of 32, -> units. */
INLINE void decode_kind(enum kind kind, enum mode mode, const tables *t, const weight *w, int64_t row,
                        int64_t from, int64_t to, int exact, const float *s, const float *z,
                        uint32_t *restrict out) {
    const int64_t size = w->groups == 1 ? up(w->k, 32) : w->group_size, first = from / size;
    const uint8_t *c = w->codes + row * w->stride;
    int64_t i = from;
    for (int64_t g = first, end = (first + 1) * size; i < to; ++g, end += size) {
        const int64_t whole = smaller(smaller(end, to), w->k) - 31;
        tables scaled = *t;
        __m512i table = _mm512_setzero_si512();
        if (kind == INT4) {
            if (!exact) {
                const __m512 added = _mm512_set1_ps(w->zero_type == NONE ? 0.0f : z[g]);
                scaled.levels = _mm512_fmadd_ps(t->levels, _mm512_set1_ps(s[g]), added);
            }
#ifdef PAIRS
            table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(scaled.levels));
#endif
        }
        for (; i < whole; i += 32, out += mode == HALVES ? 16 : 32)
            block32(kind, mode, &scaled, &table, exact, s[g], c + i / 32 * bytes32(kind), 32, out);
        if (i < smaller(end, to)) { /* the last columns of the row */
            block32(kind, mode, &scaled, &table, exact, s[g], c + i / 32 * bytes32(kind), w->k - i, out);
            return;
        }
    }
}

/* The same for groups that 32 columns straddle. */
static void decode_irregular(const weight *w, enum mode mode, int64_t row, int64_t from, int64_t to,
                             const float *s, const float *z, float *restrict decoded,
                             uint32_t *restrict out) {
    decode_plain(w, row, s, z, decoded);
    for (int64_t i = w->k; i < to; ++i) decoded[i] = 0;
    for (int64_t i = from; i < to; i += 32) {
        __m512 a, b;
#ifdef PAIRS
        if (mode == HALVES) {
            activations32(INT8, decoded, FLOAT32, i, 32, &a, &b);
            _mm512_store_si512(out + (i - from) / 2, (__m512i)_mm512_cvtne2ps_pbh(b, a));
            continue;
        }
#endif
        activations32(w->kind, decoded, FLOAT32, i, 32, &a, &b);
        _mm512_store_ps(out + i - from, a);
        _mm512_store_ps(out + i - from + 16, b);
    }
}

static void decode(const weight *w, enum mode mode, const tables *t, int64_t row, int64_t from, int64_t to,
                   int exact, const float *s, const float *z, float *decoded, uint32_t *restrict out) {
#define DECODE(KIND, MODE) decode_kind(KIND, MODE, t, w, row, from, to, exact, s, z, out)
    if (!regular(w)) decode_irregular(w, mode, row, from, to, s, z, decoded, out);
    else if (w->kind == INT8) mode == HALVES ? DECODE(INT8, HALVES) : DECODE(INT8, FLOATS);
    else if (w->kind == FLOAT8) mode == HALVES ? DECODE(FLOAT8, HALVES) : DECODE(FLOAT8, FLOATS);
    else mode == HALVES ? DECODE(INT4, HALVES) : DECODE(INT4, FLOATS);
}

/* 16 sums of row `row` of x and weight rows from `column` on, `left` of which exist -> out. */
INLINE void put16(const job *j, int64_t row, int64_t column, int64_t left, __m512 value, __m512 scales,
                  __m512 added) {
    const __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    const int64_t to = row * j->w->n + column;
    value *= scales;
    if (j->x_scale) value *= _mm512_set1_ps(j->x_scale[row]);
    value += added;
    if (j->out_type == FLOAT32) {
        _mm512_mask_storeu_ps((float *)j->out + to, there, value);
        return;
    }
#ifdef PAIRS
    _mm256_mask_storeu_epi16((uint16_t *)j->out + to, there, (__m256i)_mm512_cvtneps_pbh(value));
#else
    float wide[16];
    _mm512_storeu_ps(wide, value);
    for (int c = 0; c < left && c < 16; ++c) store(j->out, BFLOAT16, to + c, wide[c]);
#endif
}

INLINE __m512 bias16(const job *j, int64_t column, int64_t left) {
    const __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    return j->bias ? values16(j->bias, j->bias_type, column, there) : _mm512_setzero_ps();
}

/* sums [count, stride] of weight rows from `first` on -> out, for `rows` rows of x from `row` on. `scale` and
   `weight_sums` are of these weight rows; the latter only where x has zero points. */
static void finish(const job *j, const float *restrict sums, int64_t stride, int64_t first, int64_t count,
                   int64_t row, int64_t rows, const float *restrict scale,
                   const float *restrict weight_sums) {
    for (int64_t column = 0; column < count; column += 16) {
        const __m512 added = bias16(j, first + column, count - column);
        const __m512 totals = j->x_zero ? _mm512_loadu_ps(weight_sums + column) : _mm512_setzero_ps();
        for (int64_t i = 0; i < rows; i += 16) {
            __m512i v[16];
            for (int c = 0; c < 16; ++c) v[c] = _mm512_load_si512(sums + (column + c) * stride + i);
            turn(v);
            for (int r = 0; r < 16 && i + r < rows; ++r) {
                const int64_t at_row = row + i + r;
                __m512 value = _mm512_castsi512_ps(v[r]);
                if (j->x_zero) value = _mm512_fnmadd_ps(_mm512_set1_ps(j->x_zero[at_row]), totals, value);
                put16(j, at_row, first + column, count - column, value, _mm512_loadu_ps(scale + column),
                      added);
            }
        }
    }
}

/* `rows` rows of x from `row` on, packed in `x`, times weight rows [first, last). */
static void many_part(const job *j, enum mode mode, const uint32_t *x, int64_t row, int64_t rows,
                      int64_t first, int64_t last, uint32_t *block, float *sums, float *s, float *decoded) {
    const weight *w = j->w;
    const int64_t kp = up(w->k, 32), units = mode == HALVES ? kp / 2 : kp, stride = up(rows, 16);
    const int exact = w->groups == 1 && w->zero_type == NONE && regular(w);
    const tables t = tables_of(w->kind);
    float scale[BLOCK], *z = s + padded(w->groups);
    for (int64_t n = first; n < last; n += BLOCK) {
        const int64_t count = smaller(last - n, BLOCK), tiled = up(count, rows > 16 ? 12 : 24);
        for (int64_t unit = 0; unit < units; unit += UNITS) {
            const int64_t some = smaller(units - unit, UNITS), apart = some + 16,
                          per = mode == HALVES ? 2 : 1;
            for (int64_t i = 0; i < count; ++i) {
                if (unit == 0) prefetch(w->codes + (n + i) * w->stride, w->stride);
                row_scales(w, n + i, s, z);
                scale[i] = exact ? s[0] : 1;
                decode(w, mode, &t, n + i, unit * per, (unit + some) * per, exact, s, z, decoded,
                       block + i * apart);
            }
            for (int64_t i = 0; i < tiled; i += 12)
                for (int64_t lane = 0; lane < stride; lane += 32) {
                    const int two = stride - lane > 16;
                    if (!two && i % 24) continue;
                    tile *run = two ? TILE_OF(mode, 2) : TILE_OF(mode, 1);
                    run(x + (lane * units + unit * 16), units * 16, block + i * apart, apart, some,
                        sums + i * stride + lane, stride, unit > 0);
                }
        }
        finish(j, sums, stride, n, count, row, rows, scale, NULL);
    }
}
#endif
