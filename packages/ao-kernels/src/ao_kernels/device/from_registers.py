"""Weights in codes times many rows of activations on Hopper, the decoded weights never leaving registers.

The result is computed transposed, ``weight @ x.T``, for Hopper's tensor cores take their left operand from
registers. Two groups of four warps decode and multiply, each half of a tile's weights: while the tensor cores
work on 64 columns of K, the warps decode the next 64, and while one group waits for its product the other's
runs. Two more warps fetch activations and codes by the copy engine, into rings of slots: a slot is filled
once its ``full`` barrier has counted the bytes, and free again once both groups have arrived at ``empty``.

A program takes every so many pieces of the work, and its copies run ahead into the next: see
:mod:`ao_kernels.device.pieces`.

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
from ao_kernels.device.decode import INT4, NF4
from ao_kernels.device.levels import fill_levels, lane_copy
from ao_kernels.device.operand import operand
from ao_kernels.device.pieces import advance, end_of, first_expert, part_of, pieces_of_experts, place
from ao_kernels.device.scales import load_row_scales

STEP = gl.constexpr(64)
"""Columns of K that are multiplied at once: 128 bytes of activations, as far as the copy engine swizzles."""


@gluon.jit
def _fetch(
    desc, ring, full, empty, offsets_ptr, M, N, E, group_m, pieces, whole, all_tiles,
    CODES: gl.constexpr, COLUMNS: gl.constexpr, STEPS: gl.constexpr, RING: gl.constexpr, CUT: gl.constexpr,
    EXPERTS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Copy, for each piece of the work, ``STEPS`` tiles of ``COLUMNS`` to a tile of K into a ring."""
    i = pieces * 0
    expert, before, start, end = first_expert(pieces, offsets_ptr, M, E, EXPERTS)
    for at in range(gl.program_id(0), pieces, gl.num_programs(0)):
        tile, first, count = part_of(at, whole, all_tiles, CUT)
        if EXPERTS:
            expert, before, start, end = advance(
                tile, expert, before, start, end, offsets_ptr, M, N, E, BLOCK_M, BLOCK_N
            )
        row, column = place(tile - before, end - start, N, group_m, BLOCK_M, BLOCK_N)
        top = expert * N + column if CODES else start + row
        for step in range(first * STEPS, (first + count) * STEPS):
            slot = i % RING
            mbarrier.wait(empty.index(slot), (i // RING & 1) ^ 1)
            mbarrier.expect(full.index(slot), desc.block_type.nbytes)
            copy_tile(desc, [top, step * COLUMNS], full.index(slot), ring.index(slot))
            i += 1


@gluon.jit
def _multiply(
    x, codes, full, empty, codes_full, codes_empty,
    scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, offsets_ptr, out_ptr, parts_ptr,
    M, N, E, group_m, pieces, whole, all_tiles, groups, scalers, scaler_size, table,
    KIND: gl.constexpr, ZERO: gl.constexpr, CODED: gl.constexpr, BIAS: gl.constexpr, DTYPE: gl.constexpr,
    GROUP: gl.constexpr, START: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    RING: gl.constexpr, CODES_RING: gl.constexpr, CUT: gl.constexpr, EXPERTS: gl.constexpr,
    TABLE: gl.constexpr,
):  # fmt: skip
    """Rows ``[START:START + 64]`` of each tile of codes times tiles of activations, stored transposed."""
    PACKED: gl.constexpr = KIND == INT4 or KIND == NF4
    BYTES: gl.constexpr = STEP // 2 if PACKED else STEP
    WORDS: gl.constexpr = BYTES // 4
    STEPS: gl.constexpr = 128 // BYTES
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16]
    )
    TARGET: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    # Of the operand: pairs of columns to lanes, eights of columns and rows 8 apart to registers.
    LAYOUT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1, 0], [0, 2, 0], [0, 4, 0], [8, 0, 0]],
        [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]], [[16, 0, 0], [32, 0, 0]], [], [64, 8, 4],
    )  # fmt: skip
    WIDE: gl.constexpr = (
        gl.SliceLayout(2, LAYOUT)
        if PACKED
        else gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
            [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 16],
        )
    )  # fmt: skip
    # Scales: one for a row and step, or for each of the 2, 4 or 8 parts of a step. They last a number of
    # steps if a tile is a whole number of groups, or the other way round.
    EACH: gl.constexpr = 1 if GROUP % BYTES == 0 else min(BYTES // GROUP, 8) if BYTES % GROUP == 0 else 8
    BESIDE: gl.constexpr = [[0, 1], [8, 0]] if EACH == 2 else [[0, 1], [0, 2], [8, 0]]
    PARTS: gl.constexpr = (
        gl.SliceLayout(2, LAYOUT)
        if EACH == 1 or EACH == 8
        else gl.DistributedLinearLayout(
            BESIDE, [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, EACH]
        )
    )
    LASTING: gl.constexpr = GROUP > 0 and (128 % GROUP == 0 or GROUP % 128 == 0)
    part_of_step = gl.expand_dims(gl.zeros([64], gl.int32, gl.SliceLayout(1, PARTS)), 1)
    if EACH > 1:
        each = gl.expand_dims(gl.arange(0, EACH, gl.SliceLayout(0, PARTS)), 0)
        part_of_step = part_of_step + each * (BYTES // EACH)
    copy = lane_copy(table, 32) if TABLE else table
    done = pieces * 0
    expert, before, start, end = first_expert(pieces, offsets_ptr, M, E, EXPERTS)
    for at in range(gl.program_id(0), pieces, gl.num_programs(0)):
        tile_at, first, tiles = part_of(at, whole, all_tiles, CUT)
        if EXPERTS:
            expert, before, start, end = advance(
                tile_at, expert, before, start, end, offsets_ptr, M, N, E, BLOCK_M, BLOCK_N
            )
        row, column = place(tile_at - before, end - start, N, group_m, BLOCK_M, BLOCK_N)
        rows = column + START + gl.arange(0, 64, gl.SliceLayout(1, PARTS))
        rows = gl.expand_dims(gl.minimum(rows, N - 1) + expert * N, 1)
        within = part_of_step + first * 128
        raw = load_row_scales(
            scale_ptr, zero_ptr, offset_ptr, step_ptr, rows, within, groups, scalers, scaler_size,
            ZERO, CODED, GROUP,
        )  # fmt: skip
        mbarrier.wait(codes_full.index(done % CODES_RING), done // CODES_RING & 1)
        words = codes.index(done % CODES_RING).slice(START, 64).slice(0, WORDS, dim=1)
        w = operand(words, raw, copy, WIDE, LAYOUT, TARGET, KIND, ZERO, CODED, GROUP, DTYPE, TABLE)
        if GROUP > 0:
            raw = load_row_scales(
                scale_ptr, zero_ptr, offset_ptr, step_ptr, rows, within + BYTES, groups, scalers, scaler_size,
                ZERO, CODED, GROUP,
            )  # fmt: skip
        acc = gl.zeros([64, BLOCK_M], gl.float32, layout)
        mbarrier.wait(full.index(done * STEPS % RING), done * STEPS // RING & 1)
        last = done + tiles - 1
        for tile in range(done, done + tiles):
            held = w
            for part in gl.static_range(STEPS):
                i = tile * STEPS + part
                acc = warpgroup_mma(w, x.index(i % RING).permute((1, 0)), acc, is_async=True)
                # Meanwhile what comes next is decoded; after the last tile, that one again, for nothing.
                source = tile
                if part + 1 == STEPS:
                    source = gl.minimum(tile + 1, last)
                    mbarrier.wait(codes_full.index(source % CODES_RING), source // CODES_RING & 1)
                words = codes.index(source % CODES_RING).slice(START, 64)
                words = words.slice((part + 1) % STEPS * WORDS, WORDS, dim=1)
                following = operand(
                    words, raw, copy, WIDE, LAYOUT, TARGET, KIND, ZERO, CODED, GROUP, DTYPE, TABLE
                )
                if GROUP > 0 and (not LASTING or (part + 2) * BYTES % min(GROUP, 128) == 0):
                    raw = load_row_scales(
                        scale_ptr, zero_ptr, offset_ptr, step_ptr, rows,
                        within + ((tile - done) * STEPS + part + 2) * BYTES, groups, scalers, scaler_size,
                        ZERO, CODED, GROUP,
                    )  # fmt: skip
                # This wait comes first: the assembler does not move decoding beyond its loop, as it would
                # beyond the other wait. After the last step, it is for that one again.
                ahead = gl.minimum(i + 1, last * STEPS + STEPS - 1)
                mbarrier.wait(full.index(ahead % RING), ahead // RING & 1)
                # One product stays under way, but none into the next iteration, where the registers that it
                # reads change their names. Operands are named here to keep them until their products end.
                if part + 1 < STEPS:
                    acc, held = warpgroup_mma_wait(num_outstanding=1, deps=(acc, held))
                else:
                    acc, held, w = warpgroup_mma_wait(num_outstanding=0, deps=(acc, held, w))
                    mbarrier.arrive(empty.index(i % RING))
                if part > 0:
                    mbarrier.arrive(empty.index((i - 1) % RING))
                held = w
                w = following
            mbarrier.arrive(codes_empty.index(tile % CODES_RING))
        done += tiles
        inside = gl.minimum(column + START + gl.arange(0, 64, gl.SliceLayout(1, layout)), N - 1)
        if GROUP == 0 and not CODED and not (KIND == INT4 and ZERO == 1):
            scale = gl.load(scale_ptr + (inside + expert * N) * groups)
            acc *= gl.expand_dims(scale.to(gl.float32), 1)
        if CUT > 1:
            if at >= whole:
                sums_ptr = parts_ptr + (at - whole).to(gl.int64) * (BLOCK_M * BLOCK_N)
                _store(acc, sums_ptr, 0, START, BLOCK_M, BLOCK_N)
            else:
                _finish(acc, inside, bias_ptr, out_ptr, row, column + START, end, N, BIAS)
        else:
            _finish(acc, inside, bias_ptr, out_ptr, start + row, column + START, end, N, BIAS)
    if EXPERTS:  # rows of none
        zeros = gl.zeros([64, BLOCK_M], gl.float32, layout).to(out_ptr.dtype.element_ty)
        start = end_of(E, offsets_ptr, M, E)
        pieces = gl.cdiv(M - start, BLOCK_M) * gl.cdiv(N, BLOCK_N)
        for at in range(gl.program_id(0), pieces, gl.num_programs(0)):
            row, column = place(at, M - start, N, 1, BLOCK_M, BLOCK_N)
            _store(zeros, out_ptr, start + row, column + START, M, N)


@gluon.jit
def _finish(acc, inside, bias_ptr, out_ptr, row, column, end, N, BIAS: gl.constexpr):
    """Store ``acc`` and the bias of its columns ``inside``, where rows are before ``end``."""
    if BIAS:
        acc += gl.expand_dims(gl.load(bias_ptr + inside).to(gl.float32), 1)
    _store(acc.to(out_ptr.dtype.element_ty), out_ptr, row, column, end, N)


@gluon.jit
def _store(values, out_ptr, row, column, M, N):
    """``values`` ``[64, rows]`` transposed, 64 rows at a time through shared memory, in runs of 128 bytes."""
    ROWS: gl.constexpr = values.shape[1]
    if ROWS > 64:
        first, second = gl.split(values.reshape([64, 2, ROWS // 2]).permute((0, 2, 1)))
        _store(first, out_ptr, row, column, M, N)
        _store(second, out_ptr, row + ROWS // 2, column, M, N)
    else:
        layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
        n = column + gl.arange(0, 64, gl.SliceLayout(1, layout))
        m = row + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
        pointers = out_ptr + gl.expand_dims(m.to(gl.int64) * N, 0) + gl.expand_dims(n, 1)
        mask = gl.expand_dims(m < M, 0) & gl.expand_dims(n < N, 1)
        gl.store(pointers, gl.convert_layout(values, layout), mask=mask)


@gluon.jit(do_not_specialize=["M", "E", "width", "groups", "scalers", "group_m", "whole"])
def from_registers(
    x_desc, codes_desc, scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, offsets_ptr, out_ptr, parts_ptr,
    M, N, E, width, groups, scalers, scaler_size, group_m, whole,
    KIND: gl.constexpr, ZERO: gl.constexpr, CODED: gl.constexpr, BIAS: gl.constexpr, DTYPE: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, RING: gl.constexpr, CODES_RING: gl.constexpr,
    CUT: gl.constexpr, EXPERTS: gl.constexpr, TABLE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``out [M, N] = x [M, K] @ weight [N, K].T + bias``.

    Args:
        x_desc: activations ``[M, K]`` in tiles of ``BLOCK_M`` rows and 64 columns; beyond their end the copy
            engine gives 0.
        codes_desc: words of four bytes ``[N, width / 4]`` in tiles of 128 rows and 128 bytes.
        offsets_ptr: of a stack of experts, where the rows of each end, integers ``[E]``.
        parts_ptr: float32, the sums of pieces: ``[pieces of cut tiles, BLOCK_M, 128]``.
        width: bytes to a row of codes, a multiple of four.
        group_m: tiles of rows that run side by side, and find their weights in the L2 cache.
        whole: tiles of the output that are not cut.
        GROUP: bytes to a scale, a multiple of four (of eight, if a code is a byte); 0: one for the row.
        CUT: parts of K of all other tiles, for :func:`add_tiles`.
        EXPERTS: a power of two, E or more, where the weight is a stack ``[E * N, K]``; else 0. Without bias.
        TABLE: look NF4 levels up in shared memory, where they take 32 KB, rather than in registers.
    """
    STEPS: gl.constexpr = 4 if KIND == INT4 or KIND == NF4 else 2
    BLOCK_N: gl.constexpr = 128
    all_tiles = gl.cdiv(width, 128)
    if EXPERTS:
        pieces = pieces_of_experts(offsets_ptr, M, N, E, EXPERTS, BLOCK_M, BLOCK_N)
    else:
        pieces = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
        pieces = whole + (pieces - whole) * CUT
    x = gl.allocate_shared_memory(DTYPE, [RING, BLOCK_M, STEP], x_desc.layout)
    codes = gl.allocate_shared_memory(gl.int32, [CODES_RING, BLOCK_N, 32], codes_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    codes_full = gl.allocate_shared_memory(gl.int64, [CODES_RING, 1], mbarrier.MBarrierLayout())
    codes_empty = gl.allocate_shared_memory(gl.int64, [CODES_RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(CODES_RING):
        mbarrier.init(codes_full.index(i), count=1)
        mbarrier.init(codes_empty.index(i), count=2)
    fence_async_shared()
    table = pieces * 0
    if TABLE:
        table = fill_levels(DTYPE, 32)
    gl.warp_specialize(
        [
            (_multiply, (
                x, codes, full, empty, codes_full, codes_empty,
                scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, offsets_ptr, out_ptr, parts_ptr,
                M, N, E, group_m, pieces, whole, all_tiles, groups, scalers, scaler_size, table,
                KIND, ZERO, CODED, BIAS, DTYPE, GROUP, 0, BLOCK_M, BLOCK_N, RING, CODES_RING,
                CUT, EXPERTS, TABLE,
            )),
            (_multiply, (
                x, codes, full, empty, codes_full, codes_empty,
                scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, offsets_ptr, out_ptr, parts_ptr,
                M, N, E, group_m, pieces, whole, all_tiles, groups, scalers, scaler_size, table,
                KIND, ZERO, CODED, BIAS, DTYPE, GROUP, 64, BLOCK_M, BLOCK_N, RING, CODES_RING,
                CUT, EXPERTS, TABLE,
            )),
            (_fetch, (
                x_desc, x, full, empty, offsets_ptr, M, N, E, group_m, pieces, whole,
                all_tiles, False, STEP, STEPS, RING, CUT, EXPERTS, BLOCK_M, BLOCK_N,
            )),
            (_fetch, (
                codes_desc, codes, codes_full, codes_empty, offsets_ptr, M, N, E, group_m, pieces, whole,
                all_tiles, True, 32, 1, CODES_RING, CUT, EXPERTS, BLOCK_M, BLOCK_N,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
