/* The matrix unit's instructions in plain C, so that the code around them is tested where there is none.
   Compiled in with -include, before the kernels. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define __AMX_BF16__ 1
#define __AMX_INT8__ 1

static __thread uint32_t emulated_tiles[8][16][16];

static inline float emulated_half(uint32_t bits) {
    float value;
    bits <<= 16;
    memcpy(&value, &bits, 4);
    return value;
}

static inline void emulated_copy(int tile, void *memory, int64_t stride, int load) {
    for (int row = 0; row < 16; ++row) {
        uint8_t *at = (uint8_t *)memory + row * stride;
        if (load) memcpy(emulated_tiles[tile][row], at, 64);
        else memcpy(at, emulated_tiles[tile][row], 64);
    }
}

static inline void emulated_multiply(int out, int left, int right, int halves) {
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 16; ++column)
            for (int i = 0; i < 16; ++i) {
                const uint32_t a = emulated_tiles[left][row][i], b = emulated_tiles[right][i][column];
                uint32_t *sum = &emulated_tiles[out][row][column];
                float value;
                memcpy(&value, sum, 4);
                value += emulated_half(a) * emulated_half(b) + emulated_half(a >> 16) * emulated_half(b >> 16);
                if (halves) memcpy(sum, &value, 4);
                for (int byte = 0; byte < 32 && !halves; byte += 8)
                    *sum += (uint32_t)((int8_t)(a >> byte) * (int8_t)(b >> byte));
            }
}

#define _tile_loadconfig(CONFIG) ((void)(CONFIG))
#define _tile_release() ((void)0)
#define _tile_zero(TILE) memset(emulated_tiles[TILE], 0, 1024)
#define _tile_loadd(TILE, FROM, STRIDE) emulated_copy(TILE, (void *)(FROM), STRIDE, 1)
#define _tile_stored(TILE, TO, STRIDE) emulated_copy(TILE, TO, STRIDE, 0)
#define _tile_dpbf16ps(OUT, LEFT, RIGHT) emulated_multiply(OUT, LEFT, RIGHT, 1)
#define _tile_dpbssd(OUT, LEFT, RIGHT) emulated_multiply(OUT, LEFT, RIGHT, 0)
