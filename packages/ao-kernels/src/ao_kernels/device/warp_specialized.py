"""Weights in codes times many rows of activations on Hopper: decoding runs beside the tensor cores.

The warps of a program have a task each: one fetches activations and one codes, by the copy engine; two times
four decode half of the rows each, into shared memory; eight multiply. Between them lie rings of slots: a slot
is filled once its ``full`` barrier has counted all who fill it, and free again after ``empty``.

Written in Gluon, Triton's lower level, which its interpreter does not run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ao_kernels.device.copy_engine import copy_tile
from ao_kernels.device.decode import INT4, INT8, NF4, float8_values, integers, nf4_levels, scaled_nibbles
from ao_kernels.device.scales import load_row_scales, scale_of


@gluon.jit
def _fetch(desc, ring, full, empty, row, first, steps, COLUMNS: gl.constexpr, RING: gl.constexpr):
    """Copy tiles ``[row:, COLUMNS * (first + i):]`` into a ring."""
    for i in range(steps):
        slot = i % RING
        mbarrier.wait(empty.index(slot), (i // RING & 1) ^ 1)
        mbarrier.expect(full.index(slot), desc.block_type.nbytes)
        at = [row, (first + i) * COLUMNS]
        copy_tile(desc, at, full.index(slot), ring.index(slot))


@gluon.jit
def _floats(
    codes, raw,
    KIND: gl.constexpr, ZERO: gl.constexpr, CODED: gl.constexpr, GROUP: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Codes ``[ROWS, BYTES]`` as floats, scaled unless :func:`_multiply` does that."""
    scale = scale_of(raw, CODED)
    if KIND == INT4:
        middle = gl.full_like(scale, 8.0)
        midpoint = gl.zeros_like(scale)
        if ZERO == 1:
            midpoint = raw[1].to(gl.float32)
        elif ZERO == 2:
            middle = raw[1].to(gl.float32)
        if GROUP == 0 and ZERO != 1:
            scale = gl.full_like(scale, 1.0)
        middle, scale = gl.expand_dims(middle, 1), gl.expand_dims(scale, 1)
        low, high = scaled_nibbles(codes, middle, scale, gl.expand_dims(midpoint, 1), DTYPE, False)
        values = gl.join(low, high).reshape([codes.shape[0], 2 * codes.shape[1]])
    elif KIND == NF4:
        low, high = nf4_levels(codes, raw, DTYPE, False)
        if GROUP > 0 or CODED:
            low = low * gl.expand_dims(scale.to(DTYPE), 1)
            high = high * gl.expand_dims(scale.to(DTYPE), 1)
        values = gl.join(low, high).reshape([codes.shape[0], 2 * codes.shape[1]])
    else:
        if KIND == INT8:
            values = integers(codes, DTYPE, False)
        else:
            values = float8_values(codes, DTYPE, False)
        if GROUP > 0:
            values = values * gl.expand_dims(scale.to(DTYPE), 1)
    return values


@gluon.jit
def _decode(
    codes, codes_full, codes_empty, weights, full, empty,
    scale_ptr, zero_ptr, offset_ptr, step_ptr, column, N, first, tiles, groups, scalers, scaler_size,
    KIND: gl.constexpr, ZERO: gl.constexpr, CODED: gl.constexpr, GROUP: gl.constexpr,
    START: gl.constexpr, ROWS: gl.constexpr, BYTES: gl.constexpr, SLICE: gl.constexpr,
    CODES_RING: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Rows ``[START:START + ROWS]`` of each tile of codes, ``BYTES`` to a slot of weights.

    ``SLICE`` bytes share a scale. A slot of codes is given back once the last weights are stored: only then
    has reading it surely ended.
    """
    SLOTS: gl.constexpr = codes.shape[2] // BYTES
    SLICES: gl.constexpr = BYTES // SLICE
    WIDTH: gl.constexpr = weights.shape[2] // SLICES
    AT_ONCE: gl.constexpr = min(ROWS, 64)
    WIDE: gl.constexpr = min(SLICE, 16)
    layout: gl.constexpr = gl.BlockedLayout([1, WIDE], [32 * WIDE // SLICE, SLICE // WIDE], [4, 1], [1, 0])
    rows = column + START + gl.arange(0, AT_ONCE, gl.SliceLayout(1, layout))
    ahead = load_row_scales(
        scale_ptr, zero_ptr, offset_ptr, step_ptr, gl.minimum(rows, N - 1), first * SLOTS * BYTES, groups,
        scalers, scaler_size, ZERO, CODED, GROUP,
    )  # fmt: skip
    for tile in range(tiles):
        slot = tile % CODES_RING
        mbarrier.wait(codes_full.index(slot), tile // CODES_RING & 1)
        for part in gl.static_range(SLOTS):
            i = tile * SLOTS + part
            target = i % RING
            for piece in gl.static_range(SLICES):
                for row in gl.static_range(0, ROWS, AT_ONCE):
                    raw = ahead
                    if GROUP > 0 or ROWS > AT_ONCE:
                        # Of the next rows, or of the first ones of the next slice: they arrive meanwhile.
                        ahead = load_row_scales(
                            scale_ptr, zero_ptr, offset_ptr, step_ptr,
                            gl.minimum(rows + (row + AT_ONCE) % ROWS, N - 1),
                            (first * SLOTS + i) * BYTES + (piece + (row + AT_ONCE) // ROWS) * SLICE,
                            groups, scalers, scaler_size, ZERO, CODED, GROUP,
                        )  # fmt: skip
                    source = codes.index(slot).slice(START + row, AT_ONCE)
                    source = source.slice(part * BYTES + piece * SLICE, SLICE, dim=1)
                    values = _floats(source.load(layout), raw, KIND, ZERO, CODED, GROUP, weights.dtype)
                    if piece == 0 and row == 0:
                        mbarrier.wait(empty.index(target), (i // RING & 1) ^ 1)
                    place = weights.index(target).slice(START + row, AT_ONCE)
                    place.slice(piece * WIDTH, WIDTH, dim=1).store(values)
            fence_async_shared()
            mbarrier.arrive(full.index(target))
        mbarrier.arrive(codes_empty.index(slot))


@gluon.jit
def _multiply(
    x, weights, full, empty, scale_ptr, bias_ptr, out_ptr, row, column, M, N, steps, groups,
    SCALED: gl.constexpr, BIAS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    RING: gl.constexpr, ACROSS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Sum the products of the slots in float32, and store the tile of the output."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS // ACROSS, ACROSS], instr_shape=[16, BLOCK_N // ACROSS, 16]
    )
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    for i in range(steps):
        slot = i % RING
        mbarrier.wait(full.index(slot), i // RING & 1)
        acc = warpgroup_mma(x.index(slot), weights.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        before = (i + RING - 1) % RING
        mbarrier.arrive(empty.index(before), pred=i > 0)
    total = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    m = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    inside = gl.minimum(n, N - 1)
    if SCALED:
        total *= gl.expand_dims(gl.load(scale_ptr + inside * groups).to(gl.float32), 0)
    if BIAS:
        total += gl.expand_dims(gl.load(bias_ptr + inside).to(gl.float32), 0)
    out_ptr += gl.program_id(1).to(gl.int64) * M * N
    pointers = out_ptr + gl.expand_dims(m.to(gl.int64) * N, 1) + gl.expand_dims(n, 0)
    mask = gl.expand_dims(m < M, 1) & gl.expand_dims(n < N, 0)
    gl.store(pointers, total.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["M", "width", "groups", "scalers", "group_m"])
def warp_specialized(
    x_desc, codes_desc, scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, out_ptr,
    M, N, width, groups, scalers, scaler_size, group_m,
    KIND: gl.constexpr, ZERO: gl.constexpr, CODED: gl.constexpr, BIAS: gl.constexpr, DTYPE: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BYTES: gl.constexpr,
    SLICE: gl.constexpr, RING: gl.constexpr, CODES_RING: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``out [M, N] = x [M, K] @ weight [N, K].T + bias``.

    Args:
        x_desc: activations ``[M, K]`` in tiles of ``BLOCK_M`` rows; beyond their end the copy engine gives 0.
        codes_desc: bytes ``[N, width]`` in tiles of ``BLOCK_N`` rows and 128 bytes.
        group_m: tiles of rows that run side by side, and find their weights in the L2 cache.
        GROUP: bytes to a scale, a multiple of ``SLICE``; 0: one for the row.
        BYTES: of codes to a slot of weights; 128 is a multiple.
        SLICE: bytes that are decoded with one scale.

    Programs on the second axis of the grid share a row; ``out`` is then ``[programs, M, N]``.
    """
    PACKED: gl.constexpr = KIND == INT4 or KIND == NF4
    COLUMNS: gl.constexpr = 2 * BYTES if PACKED else BYTES
    ACROSS: gl.constexpr = max(num_warps * 16 // BLOCK_M, BLOCK_N // 128, 1)
    SCALED: gl.constexpr = GROUP == 0 and not CODED and not (KIND == INT4 and ZERO == 1)
    SLOTS: gl.constexpr = codes_desc.block_shape[1] // BYTES
    HALF: gl.constexpr = BLOCK_N // 2
    across_m = gl.cdiv(M, BLOCK_M)
    across_n = gl.cdiv(N, BLOCK_N)
    program = gl.program_id(0)
    band = program // (group_m * across_n)
    band_m = gl.minimum(across_m - band * group_m, group_m)
    within = program % (group_m * across_n)
    row = (band * group_m + within % band_m) * BLOCK_M
    column = within // band_m * BLOCK_N
    all_tiles = gl.cdiv(width, SLOTS * BYTES)
    share = gl.cdiv(all_tiles, gl.num_programs(1))
    first = gl.program_id(1) * share
    tiles = gl.minimum(all_tiles - first, share)
    x = gl.allocate_shared_memory(DTYPE, [RING, BLOCK_M, COLUMNS], x_desc.layout)
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, COLUMNS], DTYPE)
    weights = gl.allocate_shared_memory(DTYPE, [RING, BLOCK_N, COLUMNS], w_layout)
    codes = gl.allocate_shared_memory(gl.uint8, [CODES_RING, BLOCK_N, SLOTS * BYTES], codes_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    codes_full = gl.allocate_shared_memory(gl.int64, [CODES_RING, 1], mbarrier.MBarrierLayout())
    codes_empty = gl.allocate_shared_memory(gl.int64, [CODES_RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=3)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(CODES_RING):
        mbarrier.init(codes_full.index(i), count=1)
        mbarrier.init(codes_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (
                x, weights, full, empty, scale_ptr, bias_ptr, out_ptr, row, column, M, N, tiles * SLOTS,
                groups, SCALED, BIAS, BLOCK_M, BLOCK_N, RING, ACROSS, num_warps,
            )),
            (_decode, (
                codes, codes_full, codes_empty, weights, full, empty, scale_ptr, zero_ptr, offset_ptr,
                step_ptr, column, N, first, tiles, groups, scalers, scaler_size,
                KIND, ZERO, CODED, GROUP, 0, HALF, BYTES, SLICE, CODES_RING, RING,
            )),
            (_decode, (
                codes, codes_full, codes_empty, weights, full, empty, scale_ptr, zero_ptr, offset_ptr,
                step_ptr, column, N, first, tiles, groups, scalers, scaler_size,
                KIND, ZERO, CODED, GROUP, HALF, HALF, BYTES, SLICE, CODES_RING, RING,
            )),
            (_fetch, (x_desc, x, full, empty, row, first * SLOTS, tiles * SLOTS, COLUMNS, RING)),
            (_fetch, (
                codes_desc, codes, codes_full, codes_empty, column, first, tiles, SLOTS * BYTES, CODES_RING,
            )),
        ],
        [4, 4, 1, 1],
        [64, 64, 24, 24],
    )  # fmt: skip
