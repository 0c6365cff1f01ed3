/* CPU kernels of the int8 weights, compiled on first use for the processor at hand (native.py).

   A weight row is a short stream: the hardware prefetcher loses it at each page, so it is prefetched
   AHEAD bytes before. On a CPU with AMX, 2 threads, 1536x576 from memory, that takes dequantizing from
   182 to 57 us; reading alone takes 32 us. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#define AHEAD 4096

static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);                /* half to even */
}

static inline void store(void *out, int half, int64_t at, float value) {
    if (half) ((uint16_t *)out)[at] = to_bfloat16(value);
    else ((float *)out)[at] = value;
}

static inline void prefetch(const int8_t *row, int64_t columns) {
    for (int64_t i = 0; i < columns; i += 64) __builtin_prefetch(row + AHEAD + i, 0, 2);
}

/* codes [n, k], scale [n, groups] -> out [n, k]: code * scale. Codes and scales are finite. */
#define DEQUANTIZE(NAME, TYPE, CONVERT)                                                              \
    void NAME(const int8_t *restrict codes, const float *restrict scale, TYPE *restrict out,         \
              int64_t n, int64_t k, int64_t groups, int64_t group_size, int threads) {               \
        _Pragma("omp parallel num_threads(threads)") {                                               \
            const int64_t t = omp_get_thread_num(), count = omp_get_num_threads();                   \
            for (int64_t row = n * t / count; row < n * (t + 1) / count; ++row) {                    \
                const int8_t *c = codes + row * k;                                                   \
                TYPE *o = out + row * k;                                                             \
                prefetch(c, k);                                                                      \
                for (int64_t g = 0; g < groups; ++g) {                                               \
                    const int64_t end = (g + 1) * group_size < k ? (g + 1) * group_size : k;         \
                    const float s = scale[row * groups + g];                                         \
                    for (int64_t i = g * group_size; i < end; ++i) o[i] = CONVERT((float)c[i] * s);  \
                }                                                                                    \
            }                                                                                        \
        }                                                                                            \
    }

static inline uint16_t finite_to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline float same(float value) { return value; }

DEQUANTIZE(dequantize_bfloat16, uint16_t, finite_to_bfloat16)
DEQUANTIZE(dequantize_float32, float, same)

/* sums[m] += x[m] . c over `count` columns, for the first `rows` rows of x, k apart. Each weight is converted
   once, and four partial sums a row do not wait for one another. */
static inline __attribute__((always_inline)) void dots(const float *restrict x, int64_t k,
                                                       const int8_t *restrict c, int64_t count,
                                                       float *restrict sums, const int rows) {
    int64_t i = 0;
#ifdef __AVX512F__
    __m512 parts[4][4];
    for (int m = 0; m < rows; ++m)
        for (int q = 0; q < 4; ++q) parts[m][q] = _mm512_setzero_ps();
    for (; i + 64 <= count; i += 64)
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
            const __m128i bytes = _mm_loadu_si128((const __m128i *)(c + i + 16 * q));
            const __m512 weights = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#pragma GCC unroll 4
            for (int m = 0; m < rows; ++m)
                parts[m][q] = _mm512_fmadd_ps(_mm512_loadu_ps(x + m * k + i + 16 * q), weights, parts[m][q]);
        }
    for (int m = 0; m < rows; ++m)
        sums[m] += _mm512_reduce_add_ps((parts[m][0] + parts[m][1]) + (parts[m][2] + parts[m][3]));
#endif
    for (; i < count; ++i)
        for (int m = 0; m < rows; ++m) sums[m] += x[m * k + i] * (float)c[i];
}

/* M rows of x [M, k] times one weight row: M sums, each group of columns scaled once. */
#define ROW(M)                                                                                       \
    static inline void row_##M(const float *restrict x, const int8_t *restrict c,                    \
                               const float *restrict scale, float *restrict sums, int64_t k,         \
                               int64_t groups, int64_t group_size) {                                 \
        for (int64_t g = 0; g < groups; ++g) {                                                       \
            const int64_t start = g * group_size;                                                    \
            float sum[M] = {0};                                                                      \
            dots(x + start, k, c + start, k - start < group_size ? k - start : group_size, sum, M);  \
            for (int m = 0; m < M; ++m) sums[m] += sum[m] * scale[g];                                \
        }                                                                                            \
    }
ROW(1)
ROW(2)
ROW(3)
ROW(4)

static inline void widen(const void *restrict x, int half, int64_t from, int64_t count, float *restrict wide) {
    if (half) {
        const uint16_t *h = (const uint16_t *)x + from;
        uint32_t *bits = (uint32_t *)wide;
        for (int64_t i = 0; i < count; ++i) bits[i] = (uint32_t)h[i] << 16;
    } else memcpy(wide, (const float *)x + from, count * sizeof *wide);
}

/* out [m, n] = x @ (codes * scale).T + bias; x and out are bfloat16 if `half`, else float32. Returns 0, or
   -1 if memory is short. */
int few_rows(const void *restrict x, const int8_t *restrict codes, const float *restrict scale,
             const float *restrict bias, void *restrict out, int half, int64_t m, int64_t n, int64_t k,
             int64_t groups, int64_t group_size, int threads) {
    float *wide = malloc(m * k * sizeof *wide);
    if (!wide) return -1;
    widen(x, half, 0, m * k, wide);
#pragma omp parallel num_threads(threads)
    {
        const int64_t t = omp_get_thread_num(), count = omp_get_num_threads();
        for (int64_t row = n * t / count; row < n * (t + 1) / count; ++row) {
            const int8_t *c = codes + row * k;
            const float *s = scale + row * groups;
            prefetch(c, k);
            for (int64_t first = 0; first < m; first += 4) {
                const int64_t left = m - first < 4 ? m - first : 4;
                float sums[4] = {0};
                if (left == 4) row_4(wide + first * k, c, s, sums, k, groups, group_size);
                else if (left == 3) row_3(wide + first * k, c, s, sums, k, groups, group_size);
                else if (left == 2) row_2(wide + first * k, c, s, sums, k, groups, group_size);
                else row_1(wide + first * k, c, s, sums, k, groups, group_size);
                for (int64_t i = 0; i < left; ++i)
                    store(out, half, (first + i) * n + row, sums[i] + (bias ? bias[row] : 0.0f));
            }
        }
    }
    free(wide);
    return 0;
}

/* x [m, k] -> codes xq [m, k] and one scale a row: max(absmax, 1e-5) / 127, rounded half to even. A row with
   NaN or infinity gets codes 0 and that scale. Returns 0, or -1 if memory is short. */
int quantize_rows(const void *restrict x, int half, int8_t *restrict xq, float *restrict x_scale, int64_t m,
                  int64_t k, int threads) {
    if (m * k <= 16384) threads = 1;
    float *rows = malloc(threads * k * sizeof *rows);
    if (!rows) return -1;
#pragma omp parallel num_threads(threads)
    {
        const int64_t t = omp_get_thread_num(), count = omp_get_num_threads();
        float *wide = rows + t * k;
        for (int64_t row = m * t / count; row < m * (t + 1) / count; ++row) {
            widen(x, half, row * k, k, wide);
            const uint32_t *bits = (const uint32_t *)wide; /* without the sign they compare as numbers do */
            uint32_t largest = 0;
            for (int64_t i = 0; i < k; ++i) {
                const uint32_t each = bits[i] & 0x7fffffff;
                largest = each > largest ? each : largest;
            }
            float absmax;
            memcpy(&absmax, &largest, 4);
            const float s = (absmax < 1e-5f ? 1e-5f : absmax) / 127.0f;
            int8_t *codes = xq + row * k;
            x_scale[row] = s;
            if (largest < 0x7f800000)
                for (int64_t i = 0; i < k; ++i) codes[i] = (int8_t)(int32_t)__builtin_rintf(wide[i] / s);
            else memset(codes, 0, k);
        }
    }
    free(rows);
    return 0;
}

/* out [m, n] = (xq [m, k] @ codes [n, k].T) * x_scale * scale + bias, summed exactly in int32. */
void few_rows_int8(const int8_t *restrict xq, const float *restrict x_scale, const int8_t *restrict codes,
                   const float *restrict scale, const float *restrict bias, void *restrict out, int half,
                   int64_t m, int64_t n, int64_t k, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t t = omp_get_thread_num(), count = omp_get_num_threads();
        for (int64_t row = n * t / count; row < n * (t + 1) / count; ++row) {
            const int8_t *c = codes + row * k;
            prefetch(c, k);
            for (int64_t i = 0; i < m; ++i) {
                const int8_t *a = xq + i * k;
                int32_t sum = 0;
                for (int64_t j = 0; j < k; ++j) sum += (int32_t)a[j] * c[j];
                const float value = (float)sum * x_scale[i] * scale[row] + (bias ? bias[row] : 0.0f);
                store(out, half, i * n + row, value);
            }
        }
    }
}

/* out [m, n] = x @ (codes [n, k] * scale [n]).T + bias on the matrix unit (AMX), which multiplies bfloat16
   and sums in float32.

   Codes are exact in bfloat16, so they go in unscaled; the sums are scaled once. x [parts, padded, k] is
   bfloat16: one part, or the three that a float32 is the exact sum of; out is bfloat16 or float32
   accordingly. A block of 32 weight rows is turned into the unit's layout (pairs along k) in the cache and
   multiplied with all rows of x: the weights are read once, as int8. `padded` is m rounded up to a multiple
   of 16; n and k are multiples of 32. */
void many_rows(const uint16_t *restrict x, const int8_t *restrict codes, const float *restrict scale,
               const float *restrict bias, void *restrict out, int64_t parts, int64_t m, int64_t n, int64_t k,
               uint16_t *restrict scratch, int threads);

/* The same for int8 activations: xq [padded, k] with one scale a row, exact int32 sums; k is a multiple of
   64. */
void many_rows_int8(const int8_t *restrict xq, const float *restrict x_scale, const int8_t *restrict codes,
                    const float *restrict scale, const float *restrict bias, void *restrict out, int half,
                    int64_t m, int64_t n, int64_t k, int8_t *restrict scratch, int threads);

/* Whether many_rows and many_rows_int8 may be called; asks the system for the unit. Call it first. */
int has_matrix_unit(void);

#define GROUP 4 /* blocks turned at a time: 32 rows of x stay in the first-level cache over all of them */

/* Elements of `scratch`, of its type. */
int64_t scratch_size(int64_t k, int threads) { return (int64_t)threads * GROUP * 32 * k; }

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

int has_matrix_unit(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

typedef uint16_t pairs16 __attribute__((vector_size(32)));
typedef uint32_t quads16 __attribute__((vector_size(64)));
#define LOW(A, B) __builtin_shufflevector(A, B, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(A, B) \
    __builtin_shufflevector(A, B, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define STEP(TO, FROM, I) TO[2 * I] = LOW(FROM[I], FROM[I + 8]), TO[2 * I + 1] = HIGH(FROM[I], FROM[I + 8])
#define SHUFFLE(TO, FROM)                                                                            \
    STEP(TO, FROM, 0), STEP(TO, FROM, 1), STEP(TO, FROM, 2), STEP(TO, FROM, 3), STEP(TO, FROM, 4),   \
        STEP(TO, FROM, 5), STEP(TO, FROM, 6), STEP(TO, FROM, 7)

static inline void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

/* 16 weight rows by 32 columns -> a tile of 16 column pairs by 16 rows: four perfect shuffles transpose. */
static inline void weight_tile(const int8_t *restrict codes, int64_t k, uint16_t *restrict tile) {
    pairs16 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) memcpy(&a[i], codes + i * k, 32);
    SHUFFLE(b, a);
    SHUFFLE(a, b);
    SHUFFLE(b, a);
    SHUFFLE(a, b);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
        const __m256i pair = (__m256i)a[i];
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(pair)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(pair, 1)));
        _mm256_store_si256((__m256i *)(tile + i * 32),
                           _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(low), 16)));
        _mm256_store_si256((__m256i *)(tile + i * 32 + 16),
                           _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(high), 16)));
    }
}

/* A tile of sums [16, 16] -> out, scaled, with the bias, for the rows that exist. */
static inline void write_tile(const float *restrict sums, const float *restrict scale,
                              const float *restrict bias, void *restrict out, int half, int64_t at,
                              int64_t n, int64_t rows) {
    for (int64_t row = 0; row < rows && row < 16; ++row)
        for (int i = 0; i < 16; ++i) {
            const float value = sums[row * 16 + i] * scale[i] + (bias ? bias[i] : 0.0f);
            store(out, half, at + row * n + i, value);
        }
}

/* Up to 32 rows of x times one block of 32 weight rows -> out from index `at` on; `rows` of it exist. */
static inline void block(const uint16_t *restrict x, int64_t parts, int64_t stride,
                         const uint16_t *restrict tiles, const float *restrict scale,
                         const float *restrict bias, void *restrict out, int64_t at, int64_t rows, int64_t n,
                         int64_t k) {
    float sums[4][256] __attribute__((aligned(64)));
    const int two = rows > 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < k / 32; ++step) {
        _tile_loadd(6, tiles + step * 1024, 64);
        _tile_loadd(7, tiles + step * 1024 + 512, 64);
        for (int64_t part = 0; part < parts; ++part) {
            const uint16_t *from = x + part * stride + step * 32;
            _tile_loadd(4, from, k * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (!two) continue;
            _tile_loadd(5, from + 16 * k, k * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int right = 0; right < 2; ++right)
        for (int low = 0; low <= two; ++low)
            write_tile(sums[2 * low + right], scale + 16 * right, bias ? bias + 16 * right : bias, out,
                       parts == 1, at + 16 * low * n + 16 * right, n, rows - 16 * low);
}

void many_rows(const uint16_t *restrict x, const int8_t *restrict codes, const float *restrict scale,
               const float *restrict bias, void *restrict out, int64_t parts, int64_t m, int64_t n, int64_t k,
               uint16_t *restrict scratch, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t t = omp_get_thread_num(), count = omp_get_num_threads(), blocks = n / 32;
        configure();
        const int64_t last = blocks * (t + 1) / count;
        uint16_t *tiles = scratch + t * GROUP * 32 * k; /* [GROUP, k / 32, 2, 16, 32] */
        for (int64_t first = blocks * t / count; first < last; first += GROUP) {
            const int64_t group = last - first < GROUP ? last - first : GROUP;
            for (int64_t row = first * 32; row < (first + group) * 32; row += 16)
                for (int64_t column = 0; column < k; column += 32) {
                    if (column % 64 == 0)
                        for (int i = 0; i < 16; ++i)
                            __builtin_prefetch(codes + (row + 16 + i) * k + column, 0, 2);
                    weight_tile(codes + row * k + column, k,
                                tiles + (row / 32 - first) * 32 * k + column * 32 + row % 32 * 32);
                }
            for (int64_t row = 0; row < m; row += 32)
                for (int64_t i = 0; i < group; ++i) {
                    const int64_t start = (first + i) * 32;
                    block(x + row * k, parts, (m + 15) / 16 * 16 * k, tiles + i * 32 * k, scale + start,
                          bias ? bias + start : bias, out, row * n + start, m - row, n, k);
                }
        }
        _tile_release();
    }
}

/* 16 weight rows by 64 columns -> a tile of 16 column quads by 16 rows. */
static inline void weight_tile_int8(const int8_t *restrict codes, int64_t k, int8_t *restrict tile) {
    quads16 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) memcpy(&a[i], codes + i * k, 64);
    SHUFFLE(b, a);
    SHUFFLE(a, b);
    SHUFFLE(b, a);
    SHUFFLE(a, b);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) memcpy(tile + i * 64, &a[i], 64);
}

static inline void block_int8(const int8_t *restrict xq, const float *restrict x_scale,
                              const int8_t *restrict tiles, const float *restrict scale,
                              const float *restrict bias, void *restrict out, int half, int64_t at,
                              int64_t rows, int64_t n, int64_t k) {
    int32_t sums[4][256] __attribute__((aligned(64)));
    const int two = rows > 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < k / 64; ++step) {
        _tile_loadd(6, tiles + step * 2048, 64);
        _tile_loadd(7, tiles + step * 2048 + 1024, 64);
        _tile_loadd(4, xq + step * 64, k);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if (!two) continue;
        _tile_loadd(5, xq + 16 * k + step * 64, k);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int64_t row = 0; row < rows && row < 32; ++row)
        for (int right = 0; right < 2; ++right) {
            const int32_t *sum = sums[row / 16 * 2 + right] + row % 16 * 16;
            for (int i = 0; i < 16; ++i) {
                const float add = bias ? bias[16 * right + i] : 0.0f;
                const float value = (float)sum[i] * x_scale[row] * scale[16 * right + i] + add;
                store(out, half, at + row * n + 16 * right + i, value);
            }
        }
}

void many_rows_int8(const int8_t *restrict xq, const float *restrict x_scale, const int8_t *restrict codes,
                    const float *restrict scale, const float *restrict bias, void *restrict out, int half,
                    int64_t m, int64_t n, int64_t k, int8_t *restrict scratch, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t t = omp_get_thread_num(), count = omp_get_num_threads(), blocks = n / 32;
        const int64_t last = blocks * (t + 1) / count;
        int8_t *tiles = scratch + t * GROUP * 32 * k; /* [GROUP, k / 64, 2, 16, 64] */
        configure();
        for (int64_t first = blocks * t / count; first < last; first += GROUP) {
            const int64_t group = last - first < GROUP ? last - first : GROUP;
            for (int64_t row = first * 32; row < (first + group) * 32; row += 16)
                for (int64_t column = 0; column < k; column += 64) {
                    for (int i = 0; i < 16; ++i) __builtin_prefetch(codes + (row + 16 + i) * k + column, 0, 2);
                    weight_tile_int8(codes + row * k + column, k,
                                     tiles + (row / 32 - first) * 32 * k + column * 32 + row % 32 * 64);
                }
            for (int64_t row = 0; row < m; row += 32)
                for (int64_t i = 0; i < group; ++i) {
                    const int64_t start = (first + i) * 32;
                    block_int8(xq + row * k, x_scale + row, tiles + i * 32 * k, scale + start,
                               bias ? bias + start : bias, out, half, row * n + start, m - row, n, k);
                }
        }
        _tile_release();
    }
}
#else
int has_matrix_unit(void) { return 0; }
void many_rows_int8(const int8_t *restrict xq, const float *restrict x_scale, const int8_t *restrict codes,
                    const float *restrict scale, const float *restrict bias, void *restrict out, int half,
                    int64_t m, int64_t n, int64_t k, int8_t *restrict scratch, int threads) {}
void many_rows(const uint16_t *restrict x, const int8_t *restrict codes, const float *restrict scale,
               const float *restrict bias, void *restrict out, int64_t parts, int64_t m, int64_t n, int64_t k,
               uint16_t *restrict scratch, int threads) {}
#endif
