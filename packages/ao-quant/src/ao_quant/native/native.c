/* What Python calls (native.py). Compiled on first use for the processor at hand. */

#include "bytes.h"
#include "matrix_unit.h"
#include "quantize.h"

/* Units of this processor, each including those before it: 0 any, 1 vectors, 2 the matrix unit. Call it once
   before `linear` is to use the last. */
int best_unit(void) {
#ifdef WIDE
    return ask_for_unit() ? 2 : 1;
#else
    return 0;
#endif
}

static weight weight_of(int flags, const void *codes, const void *scale, const void *zero,
                        const float *offset, const float *step, int64_t n, int64_t k, int64_t group_size,
                        int64_t scaler_size) {
    const enum kind kind = flags & 7;
    const int64_t size = group_size < 0 || group_size > k ? k : group_size, groups = (k + size - 1) / size;
    const int64_t scalers = scaler_size > 0 ? (groups + scaler_size - 1) / scaler_size : 0;
    return (weight){.codes = codes,
                    .scale = scale,
                    .zero = zero,
                    .offset = offset,
                    .step = step,
                    .n = n,
                    .k = k,
                    .stride = kind == INT4 || kind == NF4 ? (k + 1) / 2 : k,
                    .groups = groups,
                    .group_size = size,
                    .scalers = scalers,
                    .scaler_size = scaler_size,
                    .kind = kind,
                    .scale_type = flags >> 3 & 7,
                    .zero_type = zero ? flags >> 6 & 7 : NONE,
                    .shared = flags >> 15 & 1};
}

/* Weight rows [first, last) in float32 or bfloat16, in natural order, -> out [last - first, k]. Flags are
   those of `linear`, with the type of `out`. Returns 0, or -1 if memory is short. */
int dequantize(int flags, const void *codes, const void *scale, const void *zero, const float *offset,
               const float *step, void *out, int64_t first, int64_t last, int64_t n, int64_t k,
               int64_t group_size, int64_t scaler_size, int threads) {
    const weight w = weight_of(flags, codes, scale, zero, offset, step, n, k, group_size, scaler_size);
    const int64_t own = up(2 * padded(w.groups) + k, 16);
    float *buffers = scratch(threads * own * sizeof *buffers);
    if (!buffers) return -1;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), end = share(last - first, 1, thread + 1);
        float *s = buffers + thread * own, *z = s + padded(w.groups), *decoded = z + padded(w.groups);
        for (int64_t i = share(last - first, 1, thread); i < end; ++i) {
            const int half = (flags >> 11 & 3) == BFLOAT16;
            prefetch(w.codes + (first + i) * w.stride, w.stride);
            row_scales(&w, first + i, s, z);
            decode_plain(&w, first + i, s, z, half ? decoded : (float *)out + i * k);
            uint16_t *to = (uint16_t *)out + i * k;
            for (int64_t c = 0; half && c < k; ++c) to[c] = to_bfloat16(decoded[c]);
        }
    }
    free(buffers);
    return 0;
}

/* Whether weights and activations are exact in bfloat16, so that pairs lose nothing in float32 either. */
static int exact_in_halves(const weight *w, enum rounding rounding) {
    return w->kind != NF4 && w->groups == 1 && w->zero_type == NONE && rounding != EXACT;
}

/* The sums of x as it is, or as it was quantized: the codes of job `j` on the unit that is best at m rows. */
static int multiply(const job *j, enum mode mode, int64_t few, int unit, int threads) {
    if (j->m <= few && mode != BYTES) return few_rows(j, mode, threads);
#ifdef MATRIX_UNIT
    if (unit == 2 && mode != FLOATS) return matrix_rows(j, mode, threads);
    const weight *w = j->w;
    if (unit == 2 && w->groups == 1 && w->zero_type == NONE && w->kind != NF4)
        return matrix_rows(j, HALVES, threads);
#endif
#ifdef WIDE
    if (unit) return many_rows(j, mode, threads);
#endif
    return 1;
}

/* out [m, n] = x [m, k] @ weight.T + bias. `flags`, from the lowest bits: kind (3), types of scale (3), zero
   (3), x (2), out (2), bias (2), whether all rows share a scale (1), rounding of x (3). Up to `few` rows go
   one by one. Returns 0, 1 if `unit` can't (nothing is written), or -1 if memory is short. */
int linear(int flags, const void *x, const void *codes, const void *scale, const void *zero,
           const float *offset, const float *step, const void *bias, void *out, int64_t m, int64_t n,
           int64_t k, int64_t group_size, int64_t scaler_size, int64_t few, int unit, int threads) {
    const weight w = weight_of(flags, codes, scale, zero, offset, step, n, k, group_size, scaler_size);
    job j = {.w = &w,
             .x = x,
             .bias = bias,
             .out = out,
             .m = m,
             .x_type = flags >> 9 & 3,
             .bias_type = flags >> 13 & 3,
             .out_type = flags >> 11 & 3};
    const enum rounding rounding = flags >> 16 & 7;
    enum mode mode = FLOATS;
#ifdef PAIRS
    if (j.out_type == BFLOAT16 || exact_in_halves(&w, rounding)) mode = HALVES;
#endif
    if (rounding == EXACT) return multiply(&j, mode, few, unit, threads);
#ifndef WIDE
    if (m > few) return 1;
#endif
    if (!unit && m > few) return 1;
    int bytes = 0;
#ifdef QUADS
    bytes = m > few && unit == 1 && (rounding == SYMMETRIC || rounding == AFFINE) && regular(&w);
#endif
#ifdef MATRIX_UNIT
    bytes |= m > few && unit == 2 && rounding == SYMMETRIC;
#endif
    uint8_t *memory = scratch(up(m * k * (bytes ? 1 : 2), 64) + 2 * m * sizeof(float));
    if (!memory) return -1;
    float *x_scale = (float *)(memory + up(m * k * (bytes ? 1 : 2), 64));
    const quantized to = {memory, x_scale, bytes && rounding == AFFINE ? x_scale + m : NULL};
    int failed = quantize(&j, rounding, bytes, &to, threads);
    j.x = memory, j.x_type = BFLOAT16, j.x_scale = x_scale, j.x_zero = to.zero;
    if (!failed) failed = multiply(&j, bytes ? BYTES : mode, few, unit, threads);
    free(memory);
    return failed;
}
