/* Shared by all kernels: what a weight is, bfloat16, work split among threads. */

#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define WIDE 1 /* vectors of 16 floats */
#include <immintrin.h>
#endif
#if defined(WIDE) && defined(__AVX512BF16__)
#define PAIRS 1 /* dot products of bfloat16 pairs */
#endif
#if defined(WIDE) && defined(__AVX512VNNI__)
#define QUADS 1 /* dot products of four bytes */
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#define INLINE static inline __attribute__((always_inline))

/* A weight row is a short stream: the hardware prefetcher loses it at each page, so it is prefetched AHEAD
   bytes before. On a CPU with AMX, 2 threads, 1536x576 int8 from memory, that takes dequantizing from 182
   to 57 us; reading alone takes 32 us. */
#define AHEAD 4096

enum kind { INT8, INT4, NF4, FLOAT8 };
enum type { NONE, FLOAT32, BFLOAT16, UINT8, ROOT4 };

/* A weight [n, k] in codes, with scales [n, groups]; all arithmetic on scales is float32. */
typedef struct {
    const uint8_t *codes;       /* [n, stride], two codes a byte for INT4 and NF4, the even column low */
    const void *scale, *zero;   /* scale: FLOAT32, BFLOAT16, or ROOT4: (offset + byte * step) ** 4 */
    const float *offset, *step; /* [n, scalers] for ROOT4, each for `scaler_size` groups */
    int64_t n, k, stride, groups, group_size, scalers, scaler_size;
    enum kind kind;
    enum type scale_type, zero_type; /* zero: NONE, FLOAT32 or BFLOAT16 (added), UINT8 (instead of 8) */
    int shared;                      /* one scale for all rows */
} weight;

INLINE float from_bfloat16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);                /* half to even */
}

INLINE uint16_t finite_to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float at(const void *from, enum type type, int64_t i) {
    return type == BFLOAT16 ? from_bfloat16(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

INLINE void store(void *out, enum type type, int64_t i, float value) {
    if (type == BFLOAT16) ((uint16_t *)out)[i] = to_bfloat16(value);
    else ((float *)out)[i] = value;
}

INLINE void widen(const void *restrict x, enum type type, int64_t from, int64_t count, float *restrict wide) {
    if (type == BFLOAT16) {
        const uint16_t *h = (const uint16_t *)x + from;
        uint32_t *bits = (uint32_t *)wide;
        for (int64_t i = 0; i < count; ++i) bits[i] = (uint32_t)h[i] << 16;
    } else memcpy(wide, (const float *)x + from, count * sizeof *wide);
}

INLINE void prefetch(const uint8_t *row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + AHEAD + i, 0, 2);
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

/* Where the calling thread's part of `count` things begins; `whole` is its share's unit. */
INLINE int64_t share(int64_t count, int64_t whole, int64_t thread) {
    const int64_t units = (count + whole - 1) / whole, threads = omp_get_num_threads();
    return smaller(units * thread / threads * whole, count);
}

/* `bytes` at a multiple of 64, to be freed; NULL if memory is short. */
INLINE void *scratch(int64_t bytes) { return aligned_alloc(64, up(bytes > 0 ? bytes : 1, 64)); }
