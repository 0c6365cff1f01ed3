"""Weights in codes times up to 32 rows of activations on Hopper: each warp takes a part of K of its own.

With so few rows, what counts is that instructions wait for nothing. So the copy engine fetches codes and
activations into a ring of slots; each warp decodes whole words of codes, of a part of a slot's columns, for
all of a tile's columns of the output, and multiplies by its own small matrix instructions. Activations meet
many weights there, scales lie ready in shared memory, and warps meet once a slot. Their sums are added at the
end, through shared memory.

Scales multiply sums of products, never weights: the products are exact, and sums are float32.

Written in Gluon, Triton's lower level, which its interpreter does not run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ao_kernels.device.copy_engine import copy_tile, reshaped, wait_for_all
from ao_kernels.device.decode import INT4, NF4, above
from ao_kernels.device.levels import fill_levels, lane_copy
from ao_kernels.device.scales import load_row_scales, scale_of
from ao_kernels.device.words import bits, column_of, columns_in_order, left_operand, right_operand, runs

SCALES = gl.constexpr(32)
"""Of a row of the weight, in a table in shared memory: one for each step and part."""


@gluon.constexpr_function
def _pairs(parts, columns):
    """Layout of ``[parts, columns, 2]``: what threads of a product's result need for their columns."""
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 1, 0], *bits(8, columns, 1, 3)],
        [[0, 2, 0], [0, 4, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        bits(1, parts, 0, 3), [], [parts, columns, 2],
    )  # fmt: skip


@gluon.constexpr_function
def _table(kind, *shape):
    """Shape of a table of scales; with int4 there are two numbers for each."""
    return [*shape, 2] if kind == INT4 else [*shape]


@gluon.jit
def _load_scales(
    stored, first_step, column, N, groups, scalers, scaler_size,
    ZERO: gl.constexpr, CODED: gl.constexpr, GROUP: gl.constexpr,
    PARTS: gl.constexpr, BLOCK_N: gl.constexpr, BYTES: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """What is stored for ``STEPS`` steps: ``[STEPS * PARTS, BLOCK_N]`` each, as integers of 32 bits.

    A thread keeps them for some steps. In registers of 16 bits they would be packed, and waited for.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [1, PARTS], [0, 1])
    n = column + column_of(gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout)))
    n = gl.expand_dims(gl.minimum(n, N - 1).to(gl.int64), 0)
    part = gl.expand_dims(gl.arange(0, STEPS * PARTS, gl.SliceLayout(1, layout)), 1)
    byte = (first_step * PARTS + part) * BYTES + n.to(gl.int32) * 0
    raw = load_row_scales(
        stored[0], stored[1], stored[2], stored[3], n, byte, groups, scalers, scaler_size, ZERO, CODED, GROUP
    )
    return _widened(raw[0]), _widened(raw[1]), _widened(raw[2]), _widened(raw[3])


@gluon.jit
def _widened(values):
    if values.dtype == gl.float32:
        values = values.to(gl.uint32, bitcast=True)
    elif values.dtype == gl.uint8:
        values = values.to(gl.uint32)
    else:
        values = values.to(gl.uint16, bitcast=True).to(gl.uint32)
    return values


@gluon.jit
def _narrowed(values, like):
    dtype: gl.constexpr = like.dtype.element_ty
    if dtype == gl.float32:
        values = values.to(gl.float32, bitcast=True)
    elif dtype == gl.uint8:
        values = values.to(gl.uint8)
    else:
        values = values.to(gl.uint16).to(dtype, bitcast=True)
    return values


@gluon.jit
def _keep_scales(
    table, wide, stored, KIND: gl.constexpr, ZERO: gl.constexpr, CODED: gl.constexpr, DTYPE: gl.constexpr
):
    """Into shared memory: scales, and with int4 what is added to a sum for each activation in it."""
    scale, zero, offset, step = _narrowed(wide[0], stored[0]), wide[1], wide[2], wide[3]
    if ZERO > 0:
        zero = _narrowed(zero, stored[1])
    if CODED:
        offset, step = _narrowed(offset, stored[2]), _narrowed(step, stored[3])
    scale = scale_of((scale, zero, offset, step), CODED)
    if KIND == INT4:
        middle = -(above(DTYPE) + 8.0) * scale
        if ZERO == 1:
            middle += zero.to(gl.float32)
        elif ZERO == 2:
            middle = -(above(DTYPE) + zero.to(gl.float32)) * scale
        table.store(gl.join(scale, middle))
    else:
        table.store(scale)


@gluon.jit
def _repeated(total, N: gl.constexpr, TARGET: gl.constexpr):
    """``[parts, M, 8]`` of equal columns as ``[parts, M, N]``: registers repeated."""
    parts: gl.constexpr = total.shape[0]
    rows: gl.constexpr = total.shape[1]
    columns: gl.constexpr = total.shape[2]
    if columns == N:
        result = gl.convert_layout(total, TARGET, assert_trivial=True)
    else:
        twice = gl.join(total, total).permute((0, 1, 3, 2)).reshape([parts, rows, 2 * columns])
        result = _repeated(twice, N, TARGET)
    return result


@gluon.jit
def _multiply(
    acc, words, x, scales, copy,
    KIND: gl.constexpr, SCALED: gl.constexpr, DTYPE: gl.constexpr, PARTS: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """``acc`` and the products of a slot: those of each part apart."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = words.shape[0]
    LEFT: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    OF_COLUMNS: gl.constexpr = gl.SliceLayout(1, mma)
    x = left_operand(x, KIND, PARTS, LEFT)
    weight = right_operand(words, copy, KIND, DTYPE, PARTS, RIGHT)
    if SCALED:
        product = mma_v2(x, weight, gl.zeros([PARTS, M, N], gl.float32, mma))
        if KIND == INT4:
            scale, middle = gl.split(scales.load(_pairs(PARTS, N)))
            scale = gl.convert_layout(scale, OF_COLUMNS, assert_trivial=True)
            middle = gl.convert_layout(middle, OF_COLUMNS, assert_trivial=True)
            ones = gl.full([PARTS, x.shape[2], 8], 1.0, DTYPE, RIGHT)
            total = mma_v2(x, ones, gl.zeros([PARTS, M, 8], gl.float32, mma))
            acc = _repeated(total, N, mma) * gl.expand_dims(middle, 1) + acc
        else:
            scale = scales.load(OF_COLUMNS)
        acc = product * gl.expand_dims(scale, 1) + acc
    else:
        acc = mma_v2(x, weight, acc)
    return acc


@gluon.jit(do_not_specialize=["M", "groups", "scalers"])
def warp_parts(
    x_desc, codes_desc, scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, out_ptr,
    M, N, width, groups, scalers, scaler_size,
    KIND: gl.constexpr, ZERO: gl.constexpr, CODED: gl.constexpr, BIAS: gl.constexpr, DTYPE: gl.constexpr,
    GROUP: gl.constexpr, PARTS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr,
    BYTES: gl.constexpr, RING: gl.constexpr, LONG: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``out [M, N] = x [M, K] @ weight [N, K].T + bias``.

    Args:
        x_desc: activations ``[M, K]`` in tiles of ``BLOCK_M`` rows and the columns of a slot; beyond their
            end the copy engine gives 0.
        codes_desc: words of four bytes ``[N, width / 4]`` in tiles of ``BLOCK_N`` rows and a slot's columns.
        width: bytes to a row of codes.
        GROUP: bytes to a scale, a multiple of ``BYTES``; 0: one for the row.
        PARTS: of a slot, one to each warp.
        BLOCK_N: 16 or more.
        BLOCK_M: 16 or 32.
        BYTES: of a row of codes to a part, 16 or more.
        LONG: whether a row has more than ``SCALES`` parts: tables take turns.
        num_warps: ``PARTS``.
    """
    EACH: gl.constexpr = 8 if KIND == INT4 or KIND == NF4 else 4
    WORDS: gl.constexpr = BYTES // 4
    COLUMNS: gl.constexpr = EACH * WORDS
    SCALED: gl.constexpr = GROUP > 0 or KIND == INT4 or CODED > 0
    STEPS: gl.constexpr = SCALES // PARTS
    TABLES: gl.constexpr = 2 if LONG else 1
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[PARTS, 1, 1], instr_shape=[1, 16, 8]
    )
    column = gl.program_id(0) * BLOCK_N
    row = gl.program_id(1) * BLOCK_M
    steps = gl.cdiv(width, PARTS * BYTES)
    x_ring = gl.allocate_shared_memory(DTYPE, [RING, BLOCK_M, PARTS * COLUMNS], x_desc.layout)
    ring = gl.allocate_shared_memory(gl.int32, [RING, BLOCK_N, PARTS * WORDS], codes_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(RING):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    for step in gl.static_range(RING):
        if step < steps:
            _fetch(x_desc, codes_desc, x_ring, ring, full, row, column, step)
    copy = column * 0
    if KIND == NF4:
        copy = lane_copy(fill_levels(DTYPE, 32), 32)
    stored = (scale_ptr, zero_ptr, offset_ptr, step_ptr)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0] if KIND == INT4 else [1, 0])
    if SCALED:
        tables = gl.allocate_shared_memory(gl.float32, _table(KIND, TABLES, STEPS * PARTS, BLOCK_N), flat)
        now = _load_scales(
            stored, 0, column, N, groups, scalers, scaler_size,
            ZERO, CODED, GROUP, PARTS, BLOCK_N, BYTES, STEPS,
        )  # fmt: skip
        _keep_scales(tables.index(0), now, stored, KIND, ZERO, CODED, DTYPE)
    acc = gl.zeros([PARTS, BLOCK_M, BLOCK_N], gl.float32, mma)
    for first in range(0, steps, STEPS):
        scales = full
        if SCALED:
            table = tables.index(first // STEPS % TABLES)
            scales = reshaped(table, gl.float32, _table(KIND, STEPS, PARTS, BLOCK_N), flat)
        if SCALED and LONG:
            ahead = _load_scales(
                stored, first + STEPS, column, N, groups, scalers, scaler_size,
                ZERO, CODED, GROUP, PARTS, BLOCK_N, BYTES, STEPS,
            )  # fmt: skip
        for i in range(first, gl.minimum(first + STEPS, steps)):
            mbarrier.wait(full.index(i % RING), i // RING & 1)
            words = ring.index(i % RING).load(runs(BLOCK_N, PARTS, WORDS, (4, 2, 1)))
            x = x_ring.index(i % RING).load(runs(BLOCK_M, PARTS, COLUMNS, (1, 2, 4)))
            own = scales.index(i - first if SCALED else 0)
            acc = _multiply(acc, words, x, own, copy, KIND, SCALED, DTYPE, PARTS, mma)
            if i + RING < steps:  # what was read of the slot has gone into products by now
                wait_for_all()
                _fetch(x_desc, codes_desc, x_ring, ring, full, row, column, i + RING)
        if SCALED and LONG:
            other = tables.index(1 - first // STEPS % TABLES)
            _keep_scales(other, ahead, stored, KIND, ZERO, CODED, DTYPE)
    _finish(columns_in_order(acc), scale_ptr, bias_ptr, out_ptr, row, column, M, N, groups, not SCALED, BIAS)


@gluon.jit
def _fetch(x_desc, codes_desc, x_ring, ring, full, row, column, step):
    """Ask for what a step needs, once all warps are done with what the slot held before."""
    slot = step % ring.shape[0]
    mbarrier.expect(full.index(slot), x_desc.block_type.nbytes + codes_desc.block_type.nbytes)
    copy_tile(codes_desc, [column, step * ring.shape[2]], full.index(slot), ring.index(slot))
    copy_tile(x_desc, [row, step * x_ring.shape[2]], full.index(slot), x_ring.index(slot))


@gluon.jit
def _finish(
    acc, scale_ptr, bias_ptr, out_ptr, row, column, M, N, groups, SCALE: gl.constexpr, BIAS: gl.constexpr
):
    """Store the sums of all parts, scaled with ``SCALE``."""
    PARTS: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    BLOCK_N: gl.constexpr = acc.shape[2]
    run: gl.constexpr = max(BLOCK_N // (2 * PARTS), 1)
    across: gl.constexpr = min(BLOCK_N // run, 32)
    beside: gl.constexpr = gl.BlockedLayout(
        [PARTS, 1, run], [1, 32 // across, across], [1, PARTS, 1], [2, 1, 0]
    )
    sums = gl.sum(gl.convert_layout(acc, beside), 0)
    layout: gl.constexpr = gl.SliceLayout(0, beside)
    m = gl.expand_dims(row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout)), 1)
    n = gl.expand_dims(column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout)), 0)
    if SCALE:
        sums *= gl.load(scale_ptr + gl.minimum(n, N - 1).to(gl.int64) * groups).to(gl.float32)
    if BIAS:
        sums += gl.load(bias_ptr + n, mask=n < N, other=0).to(gl.float32)
    inside = (m < M) & (n < N)
    gl.store(out_ptr + m.to(gl.int64) * N + n, sums.to(out_ptr.dtype.element_ty), mask=inside)
