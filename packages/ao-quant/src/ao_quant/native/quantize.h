/* Activations to codes, a row at a time, in one pass over memory. Arithmetic is float32, as in the
   references; a row with NaN or infinity gets codes 0 and the scale NaN. */

#pragma once
#include "few.h"

/* What x is quantized to, and how many scales it gets. */
enum rounding { EXACT, SYMMETRIC, AFFINE, FLOAT8_ROWS, FLOAT8_ONE };

typedef struct {
    void *codes;         /* [m, k]: signed bytes, or bfloat16 whole numbers (less the zero point) or float8 */
    float *scale, *zero; /* [m] */
} quantized;

/* As integers, floats compare as they do as numbers once the negative ones are turned around. */
INLINE int32_t ordered(float value) {
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

INLINE float unordered(int32_t key) {
    float value;
    key ^= key >> 31 & 0x7fffffff;
    memcpy(&value, &key, 4);
    return value;
}

/* A row in float32, in `wide` if it was not, and the least and the greatest of it and 0. NULL if one value is
   NaN or infinite. */
static const float *range(const job *j, int64_t row, float *restrict wide, float *low, float *high) {
    const int64_t k = j->w->k;
    const float *x = j->x_type == BFLOAT16 ? wide : (const float *)j->x + row * k;
    int32_t least = 0, most = 0;
    if (j->x_type == BFLOAT16) {
        const uint16_t *halves = (const uint16_t *)j->x + row * k;
        for (int64_t i = 0; i < k; ++i) {
            wide[i] = from_bfloat16(halves[i]);
            const int32_t key = ordered(wide[i]);
            least = key < least ? key : least;
            most = key > most ? key : most;
        }
    } else
        for (int64_t i = 0; i < k; ++i) {
            const int32_t key = ordered(x[i]);
            least = key < least ? key : least;
            most = key > most ? key : most;
        }
    *low = unordered(least), *high = unordered(most);
    return most < 0x7f800000 && least > (int32_t)0x807fffff ? x : NULL;
}

/* The nearest float8, half to even, of a value that rounds to no more than 448, in bfloat16: three bits of
   mantissa, or steps of 2**-9. */
INLINE uint16_t round_float8(float value) {
    const float steps = __builtin_rintf(value * 512.0f) / 512.0f;
    uint32_t bits, small;
    memcpy(&bits, &value, 4);
    memcpy(&small, &steps, 4);
    const uint32_t normal = bits + 0x7ffff + (bits >> 20 & 1);
    return (uint16_t)((bits & 0x7fffffff) < 0x3c800000 ? small >> 16 : normal >> 16 & 0xfff0); /* 2**-6 */
}

INLINE float clamped(float value, float low, float high) {
    return value < low ? low : value > high ? high : value;
}

/* Whole numbers up to 255 and float8 have no more bits than bfloat16. */
INLINE uint16_t exact_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)(bits >> 16);
}

/* Row `row` of x -> that of `to`. For FLOAT8_ONE the scale is there already. */
static void quantize_row(const job *j, enum rounding rounding, int bytes, int64_t row, const quantized *to,
                         float *restrict wide) {
    float low, high, zero = 0, scale;
    const int64_t k = j->w->k;
    const float *restrict x = range(j, row, wide, &low, &high);
    const float absmax = -low > high ? -low : high;
    if (rounding == SYMMETRIC) scale = (absmax < 1e-5f ? 1e-5f : absmax) / 127.0f;
    else if (rounding == FLOAT8_ROWS) scale = (absmax < 1e-12f ? 1e-12f : absmax) / 448.0f;
    else if (rounding == FLOAT8_ONE) scale = to->scale[row];
    else {
        scale = (high - low) / 255.0f;
        if (scale < 1.1920929e-7f) scale = 1.1920929e-7f;
        zero = clamped(-128.0f - __builtin_rintf(low / scale), -128, 127);
    }
    if (to->zero) to->zero[row] = zero;
    uint16_t *halves = (uint16_t *)to->codes + row * k;
    if (!x) {
        to->scale[row] = __builtin_nanf("");
        memset(bytes ? (uint8_t *)to->codes + row * k : (uint8_t *)halves, 0, k * (bytes ? 1 : 2));
        return;
    }
    to->scale[row] = scale;
    if (bytes) {
        int8_t *codes = (int8_t *)to->codes + row * k;
        for (int64_t i = 0; i < k; ++i)
            codes[i] = (int8_t)(int32_t)clamped(__builtin_rintf(x[i] / scale) + zero, -128, 127);
    } else if (rounding == AFFINE || rounding == SYMMETRIC)
        for (int64_t i = 0; i < k; ++i)
            halves[i] = exact_bfloat16(clamped(__builtin_rintf(x[i] / scale) + zero, -128, 127) - zero);
    else
        for (int64_t i = 0; i < k; ++i) halves[i] = round_float8(x[i] / scale);
}

/* One scale for all rows. */
static float scale_of_all(const job *j, float *restrict wide) {
    float absmax = 0;
    for (int64_t row = 0; row < j->m; ++row) {
        float low, high;
        if (!range(j, row, wide, &low, &high)) return __builtin_nanf("");
        absmax = -low > absmax ? -low : absmax;
        absmax = high > absmax ? high : absmax;
    }
    return (absmax < 1e-12f ? 1e-12f : absmax) / 448.0f;
}

/* x of the job -> `to`. Returns 0, or -1 if memory is short. */
static int quantize(const job *j, enum rounding rounding, int bytes, const quantized *to, int threads) {
    const int64_t k = j->w->k, m = j->m, apart = up(k, 16);
    if (m * k <= 8192) threads = 1;
    float *rows = scratch(threads * apart * sizeof *rows);
    if (!rows) return -1;
    if (rounding == FLOAT8_ONE) {
        const float scale = scale_of_all(j, rows);
        for (int64_t row = 0; row < m; ++row) to->scale[row] = scale;
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), last = share(m, 1, thread + 1);
        float *wide = rows + thread * apart;
        for (int64_t row = share(m, 1, thread); row < last; ++row) {
            quantize_row(j, rounding, bytes, row, to, wide);
        }
    }
    free(rows);
    return 0;
}
