/* Many rows on the matrix unit (AMX): bfloat16 products summed in float32, or int8 products in int32.

   A block of 32 weight rows is decoded in the cache and turned into the unit's layout (32-bit units of 16
   rows side by side), then multiplied with all rows of x: the codes are read once. A float32 x goes in as
   three bfloat16 parts that it is the exact sum of. */

#pragma once
#include "many.h"

#if defined(PAIRS) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define MATRIX_UNIT 1
#include <sys/syscall.h>
#include <unistd.h>

#define GROUP 4 /* blocks turned at a time: 32 rows of x stay in the first-level cache over all of them */

static int ask_for_unit(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/* Some compilers do not know what the unit's loads read: memory must be up to date before. */
#define SETTLE(POINTER) __asm__ volatile("" ::"r"(POINTER) : "memory")

static void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    SETTLE(&config);
    _tile_loadconfig(&config);
}

/* x of the job -> [parts, lanes, 16 units] to the left of zeros: bytes as they are, or bfloat16. */
static void lay_rows(const job *j, enum mode mode, int64_t parts, int64_t lanes, int64_t units, int64_t row,
                     uint32_t *restrict to) {
    const int64_t k = j->w->k;
    for (int64_t part = 0; part < parts; ++part) memset(to + (part * lanes + row) * units, 0, units * 4);
    if (row >= j->m) return;
    uint16_t *halves = (uint16_t *)(to + row * units);
    if (mode == BYTES) memcpy(halves, (const uint8_t *)j->x + row * k, k);
    else if (parts == 1) memcpy(halves, (const uint16_t *)j->x + row * k, k * 2);
    else
        for (int64_t i = 0; i < k; ++i) {
            float rest = at(j->x, FLOAT32, row * k + i);
            for (int part = 0; part < 3; ++part) {
                halves[part * lanes * units * 2 + i] = to_bfloat16(rest);
                rest -= from_bfloat16(halves[part * lanes * units * 2 + i]);
            }
        }
}

/* Weight rows [first, first + 32) -> tiles [units / 16, 2, 16, 16]; rows that do not exist are the last. */
static void turn_rows(const weight *w, enum mode mode, const tables *t, int64_t first, int64_t units,
                      int exact, float *s, float *decoded, uint32_t *restrict rows,
                      uint32_t *restrict tiles) {
    for (int64_t i = 0; i < 32; ++i) {
        const int64_t row = smaller(first + i, w->n - 1);
        prefetch(w->codes + row * w->stride, w->stride);
        if (mode == BYTES) {
            memcpy(rows + i * units, w->codes + row * w->stride, w->k);
            continue;
        }
        row_scales(w, row, s, s + padded(w->groups));
        decode(w, HALVES, t, row, 0, up(w->k, 32), exact, s, s + padded(w->groups), decoded,
               rows + i * units);
    }
    for (int64_t unit = 0; unit < units; unit += 16)
        for (int half = 0; half < 2; ++half) {
            __m512i v[16];
            for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(rows + (16 * half + i) * units + unit);
            turn(v);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(tiles + unit * 32 + half * 256 + i * 16, v[i]);
        }
}

/* Up to 32 rows of x times 32 weight rows -> sums [row half, weight half, 16, 16]. */
#define MULTIPLY(NAME, INSTRUCTION)                                                                 \
    static void NAME(const uint32_t *restrict x, int64_t parts, int64_t apart,                      \
                     const uint32_t *restrict tiles, int64_t units, int two, void *restrict sums) { \
        SETTLE(tiles);                                                                              \
        _tile_zero(0);                                                                              \
        _tile_zero(1);                                                                              \
        _tile_zero(2);                                                                              \
        _tile_zero(3);                                                                              \
        for (int64_t unit = 0; unit < units; unit += 16) {                                          \
            _tile_loadd(6, tiles + unit * 32, 64);                                                  \
            _tile_loadd(7, tiles + unit * 32 + 256, 64);                                            \
            for (int64_t part = 0; part < parts; ++part) {                                          \
                const uint32_t *from = x + part * apart + unit;                                     \
                _tile_loadd(4, from, units * 4);                                                    \
                INSTRUCTION(0, 4, 6);                                                               \
                INSTRUCTION(1, 4, 7);                                                               \
                if (!two) continue;                                                                 \
                _tile_loadd(5, from + 16 * units, units * 4);                                       \
                INSTRUCTION(2, 5, 6);                                                               \
                INSTRUCTION(3, 5, 7);                                                               \
            }                                                                                       \
        }                                                                                           \
        _tile_stored(0, sums, 64);                                                                  \
        _tile_stored(1, (uint8_t *)sums + 1024, 64);                                                \
        _tile_stored(2, (uint8_t *)sums + 2048, 64);                                                \
        _tile_stored(3, (uint8_t *)sums + 3072, 64);                                                \
    }
MULTIPLY(multiply_halves, _tile_dpbf16ps)
MULTIPLY(multiply_bytes, _tile_dpbssd)

static void put_block(const job *j, enum mode mode, const __m512i *sums, int64_t row, int64_t column,
                      const float *scale) {
    for (int half = 0; half < 2 && column + 16 * half < j->w->n; ++half) {
        const int64_t first = column + 16 * half, left = j->w->n - first;
        const __m512 added = bias16(j, first, left), scales = _mm512_loadu_ps(scale + 16 * half);
        for (int64_t i = 0; i < 32 && row + i < j->m; ++i) {
            const __m512i sum = sums[(i / 16 * 2 + half) * 16 + i % 16];
            const __m512 value = mode == BYTES ? _mm512_cvtepi32_ps(sum) : _mm512_castsi512_ps(sum);
            put16(j, row + i, first, left, value, scales, added);
        }
    }
}

/* As many_rows, for BYTES of int8 weights with one scale a row, or HALVES; with float32 activations only for
   weights that are exact in bfloat16. */
static int matrix_rows(const job *j, enum mode mode, int threads) {
    const weight *w = j->w;
    const int exact = w->groups == 1 && w->zero_type == NONE && regular(w);
    const int64_t units = mode == BYTES ? up(w->k, 64) / 4 : up(w->k, 32) / 2, lanes = up(j->m, 16);
    const int64_t parts = mode == HALVES && j->x_type == FLOAT32 ? 3 : 1, blocks = (w->n + 31) / 32;
    const int64_t own = up(32 * units * (GROUP + 1) + 2 * padded(w->groups) + up(w->k, 32), 16);
    uint32_t *x = scratch(((parts * lanes + 16) * units + threads * own) * 4);
    if (!x) return -1;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), last = share(blocks, 1, thread + 1);
        uint32_t *tiles = x + (parts * lanes + 16) * units + thread * own, *rows = tiles + GROUP * 32 * units;
        float *s = (float *)(rows + 32 * units), scale[GROUP * 32];
        const tables t = tables_of(w->kind);
        __m512i sums[64];
        memset(rows, 0, 32 * units * 4);
        for (int64_t row = share(lanes, 1, thread); row < share(lanes, 1, thread + 1); ++row)
            lay_rows(j, mode, parts, lanes, units, row, x);
        configure();
#pragma omp barrier
        for (int64_t first = share(blocks, 1, thread); first < last; first += GROUP) {
            const int64_t group = smaller(last - first, GROUP);
            for (int64_t i = 0; i < group; ++i)
                turn_rows(w, mode, &t, (first + i) * 32, units, exact, s, s + 2 * padded(w->groups), rows,
                          tiles + i * 32 * units);
            for (int64_t i = 0; i < group * 32; ++i) {
                row_scales(w, smaller(first * 32 + i, w->n - 1), s, s + padded(w->groups));
                scale[i] = exact ? s[0] : 1;
            }
            for (int64_t row = 0; row < j->m; row += 32)
                for (int64_t i = 0; i < group; ++i) {
                    (mode == BYTES ? multiply_bytes : multiply_halves)(x + row * units, parts, lanes * units,
                                                                       tiles + i * 32 * units, units,
                                                                       lanes - row > 16, sums);
                    put_block(j, mode, sums, row, (first + i) * 32, scale + i * 32);
                }
        }
        _tile_release();
    }
    free(x);
    return 0;
}
#else
static int ask_for_unit(void) { return 0; }
#endif
