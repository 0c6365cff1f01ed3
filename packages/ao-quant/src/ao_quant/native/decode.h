/* Codes to floats, a row at a time.

   Vectors take 32 columns at once, in one of two orders: natural, or split (16 even columns, then 16 odd
   ones), which is how nibbles and shifted pairs come apart for free. A product over k does not mind the
   order as long as both sides have the same. */

#pragma once
#include "common.h"

enum mode { HALVES, FLOATS, BYTES }; /* what is multiplied: bfloat16 pairs, floats, or signed bytes */

static const float LEVELS[2][16] = {{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
                                    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                                     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f,
                                     0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,
                                     0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                                     0.7229568362236023f, 1.0f}}; /* INT4, NF4 */

/* Four bits of exponent (bias 7), three of mantissa; all ones is NaN. */
INLINE float from_float8(uint8_t code) {
    const uint32_t exponent = code >> 3 & 15, mantissa = code & 7, sign = (uint32_t)(code >> 7) << 31;
    const uint32_t bits = (code & 127) == 127 ? 0x7fc00000 : (exponent + 120) << 23 | mantissa << 20;
    float value = (float)mantissa / 512;
    if (exponent) memcpy(&value, &bits, 4);
    return sign ? -value : value;
}

/* The scales of a row, and what is added to each of a group's weights (untouched where nothing is). Both have
   room for `padded(groups)`, filled with zeros. */
INLINE int64_t padded(int64_t groups) { return up(groups, 16) + 16; }

INLINE float root4(const weight *w, int64_t row, int64_t g) {
    const int64_t scaler = row * w->scalers + g / w->scaler_size;
    const float code = (float)((const uint8_t *)w->scale)[row * w->groups + g];
    const float root = w->offset[scaler] + code * w->step[scaler], square = root * root;
    return square * square;
}

#ifdef WIDE
INLINE __m512 values16(const void *from, enum type type, int64_t first, __mmask16 there) {
    if (type == FLOAT32) return _mm512_maskz_loadu_ps(there, (const float *)from + first);
    if (type == UINT8) {
        const __m128i bytes = _mm_maskz_loadu_epi8(there, (const uint8_t *)from + first);
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    }
    const __m256i halves = _mm256_maskz_loadu_epi16(there, (const uint16_t *)from + first);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE void row_scales(const weight *w, int64_t row, float *restrict s, float *restrict z) {
    const int64_t first = w->shared ? 0 : row * w->groups;
    for (int64_t g = 0; g < w->groups; g += 16) {
        const __mmask16 there = w->groups - g >= 16 ? 0xffff : (__mmask16)((1u << (w->groups - g)) - 1);
        const int coded = w->scale_type == ROOT4;
        __m512 scale = values16(w->scale, coded ? UINT8 : w->scale_type, first + g, there);
        if (coded && (w->scalers == 1 || w->scaler_size % 16 == 0)) {
            const int64_t scaler = row * w->scalers + g / w->scaler_size;
            scale =
                _mm512_fmadd_ps(scale, _mm512_set1_ps(w->step[scaler]), _mm512_set1_ps(w->offset[scaler]));
            scale *= scale;
            scale *= scale;
        }
        _mm512_storeu_ps(s + g, _mm512_maskz_mov_ps(there, scale));
        if (coded && w->scalers > 1 && w->scaler_size % 16)
            for (int64_t i = g; i < smaller(g + 16, w->groups); ++i) s[i] = root4(w, row, i);
        if (w->zero_type == NONE) continue;
        __m512 zero = values16(w->zero, w->zero_type, first + g, there);
        if (w->zero_type == UINT8) zero = (_mm512_set1_ps(8) - zero) * scale;
        _mm512_storeu_ps(z + g, _mm512_maskz_mov_ps(there, zero));
    }
}
#else
INLINE void row_scales(const weight *w, int64_t row, float *restrict s, float *restrict z) {
    const int64_t first = w->shared ? 0 : row * w->groups;
    if (w->scale_type != ROOT4) widen(w->scale, w->scale_type, first, w->groups, s);
    else
        for (int64_t g = 0; g < w->groups; ++g) s[g] = root4(w, row, g);
    if (w->zero_type == UINT8)
        for (int64_t g = 0; g < w->groups; ++g)
            z[g] = (float)(8 - ((const uint8_t *)w->zero)[first + g]) * s[g];
    else if (w->zero_type != NONE) widen(w->zero, w->zero_type, first, w->groups, z);
}
#endif

/* A row in float32, in natural order, by any compiler and for any group size. */
static void decode_plain(const weight *w, int64_t row, const float *restrict s, const float *restrict z,
                         float *restrict out) {
    const uint8_t *c = w->codes + row * w->stride;
    for (int64_t g = 0; g < w->groups; ++g) {
        const int64_t start = g * w->group_size, end = smaller(start + w->group_size, w->k);
        if (w->kind == INT8)
            for (int64_t i = start; i < end; ++i) out[i] = (float)(int8_t)c[i] * s[g];
        else if (w->kind == FLOAT8)
            for (int64_t i = start; i < end; ++i) out[i] = from_float8(c[i]) * s[g];
        else {
            const float added = w->zero_type == NONE ? 0.0f : z[g];
            float table[16];
            for (int i = 0; i < 16; ++i) table[i] = LEVELS[w->kind - INT4][i] * s[g] + added;
            for (int64_t i = start; i < end; ++i) out[i] = table[c[i / 2] >> i % 2 * 4 & 15];
        }
    }
}

#ifdef WIDE
/* Whether 32 columns at a time never straddle two groups. */
INLINE int regular(const weight *w) { return w->groups == 1 || w->group_size % 32 == 0; }
INLINE int is_split(enum kind kind) { return kind != INT8; }
INLINE int64_t bytes32(enum kind kind) { return kind == INT4 || kind == NF4 ? 16 : 32; }

/* What a kind's codes are looked up in. */
typedef struct {
    __m512 levels;      /* the 16 nibbles */
    __m512i quarter[4]; /* the 128 float8 from 0 up, as bfloat16 */
} tables;

INLINE tables tables_of(enum kind kind) {
    tables t;
    t.levels = _mm512_loadu_ps(LEVELS[kind == NF4]);
    if (kind == FLOAT8)
        for (int q = 0; q < 4; ++q) {
            uint16_t halves[32];
            for (int i = 0; i < 32; ++i) halves[i] = to_bfloat16(from_float8(32 * q + i));
            t.quarter[q] = _mm512_loadu_si512(halves);
        }
    return t;
}

/* 32 float8 -> 32 bfloat16, natural order. */
INLINE __m512i float8_halves(const tables *t, __m256i bytes) {
    const __m512i wide = _mm512_cvtepu8_epi16(bytes);
    const __m512i low = _mm512_permutex2var_epi16(t->quarter[0], wide, t->quarter[1]);
    const __m512i high = _mm512_permutex2var_epi16(t->quarter[2], wide, t->quarter[3]);
    const __mmask32 upper = _mm512_test_epi16_mask(wide, _mm512_set1_epi16(64));
    const __m512i magnitude = _mm512_mask_blend_epi16(upper, low, high);
    /* magnitude | (shifted & sign) */
    return _mm512_ternarylogic_epi32(magnitude, _mm512_slli_epi16(wide, 8), _mm512_set1_epi16(-32768), 0xf8);
}

/* 32 columns -> two vectors in the kind's order, unscaled. `count` of them exist: others are not read. */
INLINE void floats32(enum kind kind, const tables *t, const uint8_t *c, int64_t count, __m512 *a, __m512 *b) {
    if (kind == INT4 || kind == NF4) {
        const __mmask16 there = count >= 32 ? 0xffff : (__mmask16)((1u << (count + 1) / 2) - 1);
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, c));
        *a = _mm512_permutexvar_ps(bytes, t->levels); /* looks at the low four bits alone */
        *b = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), t->levels);
        return;
    }
    const __mmask32 there = count >= 32 ? 0xffffffff : (1u << count) - 1;
    const __m256i bytes = _mm256_maskz_loadu_epi8(there, c);
    if (kind == INT8) {
        *a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
        *b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    } else {
        const __m512i halves = float8_halves(t, bytes);
        *a = _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
        *b = _mm512_castsi512_ps(_mm512_and_si512(halves, _mm512_set1_epi32(-65536)));
    }
}

/* 32 columns of byte codes as the multiplier takes them: one vector of bfloat16 in natural order, or two of
   floats in the kind's order. */
INLINE void codes32(enum kind kind, enum mode mode, const tables *t, const uint8_t *c, int64_t count,
                    __m512i *to) {
#ifdef PAIRS
    if (mode == HALVES && kind == FLOAT8) {
        const __mmask32 there = count >= 32 ? 0xffffffff : (1u << count) - 1;
        to[0] = float8_halves(t, _mm256_maskz_loadu_epi8(there, c));
        return;
    }
#endif
    __m512 a, b;
    floats32(kind, t, c, count, &a, &b);
#ifdef PAIRS
    if (mode == HALVES) {
        to[0] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        return;
    }
#endif
    to[0] = _mm512_castps_si512(a);
    to[1] = _mm512_castps_si512(b);
}

/* The same of a row of float32 or bfloat16 activations. */
INLINE void activations32(enum kind kind, const void *x, enum type type, int64_t from, int64_t count,
                          __m512 *a, __m512 *b) {
    const __mmask32 there = count >= 32 ? 0xffffffff : count <= 0 ? 0 : (1u << count) - 1;
    __m512 low, high;
    if (type == BFLOAT16) {
        const __m512i halves = _mm512_maskz_loadu_epi16(there, (const uint16_t *)x + from);
        if (is_split(kind)) {
            *a = _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
            *b = _mm512_castsi512_ps(_mm512_and_si512(halves, _mm512_set1_epi32(-65536)));
            return;
        }
        const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
        const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
        low = _mm512_castsi512_ps(_mm512_slli_epi32(first, 16));
        high = _mm512_castsi512_ps(_mm512_slli_epi32(second, 16));
    } else {
        low = _mm512_maskz_loadu_ps((__mmask16)there, (const float *)x + from);
        high = _mm512_maskz_loadu_ps((__mmask16)(there >> 16), (const float *)x + from + 16);
    }
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    *a = is_split(kind) ? _mm512_permutex2var_ps(low, even, high) : low;
    *b = is_split(kind) ? _mm512_permutex2var_ps(low, odd, high) : high;
}
#endif
