/* Many rows of signed bytes: sums of a group in int32, exact, on the dot product of four bytes.

   The instruction multiplies unsigned by signed: x comes moved up by 128, and each sum starts from -128 times
   the sum of its weights. */

#pragma once
#include "many.h"

#ifdef QUADS
/* What a block of weight rows has besides its bytes, a row `room` apart. */
typedef struct {
    const float *scale;         /* of each group */
    const int32_t *start;       /* of each group's sums */
    int64_t room, groups, size; /* size: units to a group */
} grouped;

#define BYTE_TILE(NAME, MR, NR)                                                                              \
    static void NAME(const uint32_t *restrict x, int64_t xs, const uint32_t *restrict w, int64_t units,      \
                     const float *restrict scale, const int32_t *restrict start, const grouped *g,           \
                     float *restrict sums, int64_t stride) {                                                 \
        __m512 total[NR][MR];                                                                                \
        _Pragma("GCC unroll 12") for (int j = 0; j < NR; ++j)                                                \
            _Pragma("GCC unroll 2") for (int i = 0; i < MR; ++i) total[j][i] = _mm512_setzero_ps();          \
        int64_t p = 0;                                                                                       \
        for (int64_t group = 0; group < g->groups; ++group) {                                                \
            __m512i acc[NR][MR];                                                                             \
            _Pragma("GCC unroll 12") for (int j = 0; j < NR; ++j)                                            \
                _Pragma("GCC unroll 2") for (int i = 0; i < MR; ++i) acc[j][i] =                             \
                    _mm512_set1_epi32(start[j * g->room + group]);                                           \
            for (const int64_t end = smaller(p + g->size, units); p < end; ++p) {                            \
                __m512i v[MR];                                                                               \
                _Pragma("GCC unroll 2") for (int i = 0; i < MR; ++i) v[i] =                                  \
                    _mm512_load_si512(x + i * xs + p * 16);                                                  \
                _Pragma("GCC unroll 12") for (int j = 0; j < NR; ++j)                                        \
                    _Pragma("GCC unroll 2") for (int i = 0; i < MR; ++i) acc[j][i] = _mm512_dpbusd_epi32(    \
                        acc[j][i], v[i], _mm512_set1_epi32((int32_t)w[j * (units + 16) + p]));               \
            }                                                                                                \
            _Pragma("GCC unroll 12") for (int j = 0; j < NR; ++j)                                            \
                _Pragma("GCC unroll 2") for (int i = 0; i < MR; ++i) total[j][i] = _mm512_fmadd_ps(          \
                    _mm512_cvtepi32_ps(acc[j][i]), _mm512_set1_ps(scale[j * g->room + group]), total[j][i]); \
        }                                                                                                    \
        _Pragma("GCC unroll 12") for (int j = 0; j < NR; ++j)                                                \
            _Pragma("GCC unroll 2") for (int i = 0; i < MR; ++i)                                             \
                _mm512_store_ps(sums + j * stride + 16 * i, total[j][i]);                                    \
    }
BYTE_TILE(bytes_1, 1, 12)
BYTE_TILE(bytes_2, 2, 6)

/* 64 columns of codes as signed bytes, zeros where there are none. */
INLINE __m512i bytes64(enum kind kind, const uint8_t *c, int64_t count) {
    const __mmask64 there = count >= 64 ? ~0ull : (1ull << count) - 1;
    if (kind == INT8) return _mm512_maskz_loadu_epi8(there, c);
    const __mmask32 full = count >= 64 ? 0xffffffff : (__mmask32)((1ull << (count + 1) / 2) - 1);
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(full, c));
    const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
    const __m512i codes = _mm512_and_si512(both, _mm512_set1_epi8(15));
    return _mm512_maskz_sub_epi8(there, codes, _mm512_set1_epi8(8));
}

/* A weight row in bytes, the start of each of its groups' sums, and the sum of the scaled weights. */
static float decode_bytes(const weight *w, int64_t row, const float *restrict s, int32_t *restrict start,
                          uint32_t *restrict to) {
    const int64_t size = w->groups == 1 ? w->k : w->group_size;
    const uint8_t *c = w->codes + row * w->stride;
    for (int64_t i = 0; i < w->k; i += 64, to += 16) {
        const uint8_t *from = w->kind == INT8 ? c + i : c + i / 2;
        _mm512_store_si512(to,
                           w->kind == INT8 ? bytes64(INT8, from, w->k - i) : bytes64(INT4, from, w->k - i));
    }
    const int8_t *bytes = (const int8_t *)(to - up(w->k, 64) / 4);
    float total = 0;
    for (int64_t g = 0; g < w->groups; ++g) {
        const int64_t end = smaller((g + 1) * size, up(w->k, 32));
        __m256i sums = _mm256_setzero_si256();
        for (int64_t i = g * size; i < end; i += 32)
            sums = _mm256_dpbusd_epi32(sums, _mm256_set1_epi8(1),
                                       _mm256_load_si256((const __m256i *)(bytes + i)));
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        const int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
        start[g] = -128 * sum;
        total += s[g] * (float)sum;
    }
    return total;
}

/* As many_part. `s` has room for BLOCK rows of scales, and as many of starts. */
static void bytes_part(const job *j, const uint32_t *x, int64_t row, int64_t rows, int64_t first,
                       int64_t last, uint32_t *block, float *sums, float *s) {
    const weight *w = j->w;
    const int64_t units = up(w->k, 64) / 4, stride = up(rows, 16), room = padded(w->groups);
    int32_t *start = (int32_t *)(s + BLOCK * room);
    const grouped g = {s, start, room, w->groups, w->groups == 1 ? units : w->group_size / 4};
    float ones[BLOCK], weight_sums[BLOCK];
    for (int i = 0; i < BLOCK; ++i) ones[i] = 1;
    for (int64_t n = first; n < last; n += BLOCK) {
        const int64_t count = smaller(last - n, BLOCK);
        for (int64_t i = 0; i < count; ++i) {
            prefetch(w->codes + (n + i) * w->stride, w->stride);
            row_scales(w, n + i, s + i * room, NULL);
            weight_sums[i] = decode_bytes(w, n + i, s + i * room, start + i * room, block + i * (units + 16));
        }
        for (int64_t i = 0; i < count; i += 6)
            for (int64_t lane = 0; lane < stride; lane += 32) {
                const int two = stride - lane > 16;
                if (!two && i % 12) continue;
                (two ? bytes_2 : bytes_1)(x + lane * units, units * 16, block + i * (units + 16), units,
                                          s + i * room, start + i * room, &g, sums + i * stride + lane,
                                          stride);
            }
        finish(j, sums, stride, n, count, row, rows, ones, weight_sums);
    }
}
#endif

#ifdef WIDE
INLINE int64_t units_of(enum mode mode, int64_t k) {
    return mode == BYTES ? up(k, 64) / 4 : mode == HALVES ? up(k, 32) / 2 : up(k, 32);
}

/* Returns 0, or -1 if memory is short. */
static int many_rows(const job *j, enum mode mode, int threads) {
    const weight *w = j->w;
    const int64_t units = units_of(mode, w->k), lanes = up(smaller(j->m, ROWS_AT_ONCE), 16);
    const int64_t block_size = BLOCK * ((mode == BYTES ? units : smaller(units, UNITS)) + 16);
    const int64_t scales = (mode == BYTES ? 2 * BLOCK : 2) * padded(w->groups) + up(w->k, 32);
    const int64_t own = up(block_size + BLOCK * lanes + scales, 16);
    uint32_t *x = scratch((lanes * units + threads * own) * 4);
    if (!x) return -1;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num();
        const int64_t first = share(w->n, 24, thread), last = share(w->n, 24, thread + 1);
        uint32_t *block = x + lanes * units + thread * own;
        float *sums = (float *)(block + block_size), *s = sums + BLOCK * lanes;
        for (int64_t row = 0; row < j->m; row += ROWS_AT_ONCE) {
            const int64_t rows = smaller(j->m - row, ROWS_AT_ONCE), end = share(rows, 16, thread + 1);
            for (int64_t i = share(rows, 16, thread); i < end; i += 16) pack(j, mode, row + i, x + i * units);
#pragma omp barrier
#ifdef QUADS
            if (mode == BYTES) bytes_part(j, x, row, rows, first, last, block, sums, s);
            else
#endif
                many_part(j, mode, x, row, rows, first, last, block, sums, s, s + 2 * padded(w->groups));
#pragma omp barrier
        }
    }
    free(x);
    return 0;
}
#endif
