"""Weights in codes times few rows of activations: one pass over the codes, decoded in registers.

A program computes ``BLOCK_N`` columns of the output for ``BLOCK_M`` rows, and works on ``SPLITS``
neighbouring parts of K at once: rows of its tile of weights are pairs (column of the output, part),
columns of its tile of activations are pairs (part, row), and of their product the blocks where both
parts agree are added up. So the tensor cores' least width of eight is filled by parts of K rather than
by zeros, enough loads are under way, and no second program has to add anything: results do not depend
on timing.

Scales multiply sums of products, never weights: the products are exact, and sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ao_kernels.device.decode import (
    INT4,
    INT8,
    NF4,
    above,
    dot,
    float8_values,
    integers,
    nf4_levels,
    nibbles,
)
from ao_kernels.device.levels import (
    fetch_ahead,
    fill_levels,
    keep_copy,
    lane_copy,
    pairs_of_columns,
    pairs_of_levels,
)
from ao_kernels.device.scales import load_scales, scale_of


@triton.jit
def few_rows_tile(
    column, first, last, base,
    x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, out_ptr, table_ptr,
    N, width, x_stride, codes_stride, groups, scalers, scaler_size,
    KIND: tl.constexpr, ZERO: tl.constexpr, CODED: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BYTES: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, COPIES: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of :func:`few_rows`: columns of the output from ``column`` on, rows ``[first, last)``.

    Args:
        base: the weight's first row among those of ``codes_ptr``: that of an expert in a stack.
    """
    TILE_N: tl.constexpr = BLOCK_N * SPLITS
    TILE_M: tl.constexpr = BLOCK_M * SPLITS
    tile_n = tl.arange(0, TILE_N)
    tile_m = tl.arange(0, TILE_M)
    byte = tl.arange(0, BYTES)
    n = column + tile_n // SPLITS
    if not WHOLE:
        n = tl.minimum(n, N - 1)
    m = first + tile_m % BLOCK_M
    start_n = (tile_n % SPLITS) * BYTES
    start_m = (tile_m // BLOCK_M) * BYTES
    long_n = n.to(tl.int64) + base
    code_ptrs = codes_ptr + (long_n * codes_stride + start_n)[:, None] + byte[None, :]
    x_ptrs = x_ptr + (m.to(tl.int64) * x_stride + start_m)[None, :] + byte[:, None]
    scale_ptrs = scale_ptr + long_n * groups
    zero_ptrs = zero_ptr + long_n * groups
    offset_ptrs = offset_ptr + long_n * scalers
    step_ptrs = step_ptr + long_n * scalers
    there = (m < last)[None, :]
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    raw = load_scales(
        scale_ptrs, zero_ptrs, offset_ptrs, step_ptrs, start_n, groups, scaler_size, ZERO, CODED, GROUP
    )
    if COPIES > 0:
        # While the table is filled, the first codes are on their way to the L2 cache.
        LINES: tl.constexpr = max(SPLITS * BYTES * 4 // 128, 1)
        line = tl.arange(0, TILE_N * BYTES * 4 // 128)
        ahead_n = tl.minimum(column + line // LINES, N - 1).to(tl.int64) + base
        fetch_ahead(codes_ptr + ahead_n * codes_stride + tl.minimum(line % LINES * 128, width - 1))
        keep_copy(lane_copy(fill_levels(DTYPE, COPIES), COPIES))
    for i in tl.range(0, tl.cdiv(width, SPLITS * BYTES), num_stages=STAGES):
        at = i * (SPLITS * BYTES)
        if WHOLE:
            codes = tl.load(code_ptrs + at)
            x = tl.load(x_ptrs + at, mask=there, other=0)
        else:
            codes = tl.load(code_ptrs + at, mask=(start_n + at)[:, None] + byte[None, :] < width, other=0)
            inside = (start_m + at)[None, :] + byte[:, None] < width
            x = tl.load(x_ptrs + at, mask=there & inside, other=0)
        scale = scale_of(raw, CODED)
        middle = -(above(DTYPE) + 8.0) * scale
        if ZERO == 1:
            middle += raw[1].to(tl.float32)
        elif ZERO == 2:
            middle = -(above(DTYPE) + raw[1].to(tl.float32)) * scale
        # What the next products are scaled by: under way while these are computed.
        after = start_n + at + SPLITS * BYTES
        raw = load_scales(
            scale_ptrs, zero_ptrs, offset_ptrs, step_ptrs, after, groups, scaler_size, ZERO, CODED, GROUP
        )
        if COPIES > 0:
            first_of_two, second_of_two = pairs_of_columns(x, DTYPE)
        elif KIND == INT4 or KIND == NF4:
            even = (x & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
            odd = (x >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        if KIND == INT4:
            low, high, ones = nibbles(codes, DTYPE, INTERPRET)
            part = dot(low, even, INTERPRET) + dot(high, odd, INTERPRET)
            total = dot(ones, even, INTERPRET) + dot(ones, odd, INTERPRET)
            acc += part * scale[:, None] + total * middle[:, None]
        elif COPIES > 0:
            low, high = pairs_of_levels(codes, DTYPE, COPIES)
            part = dot(low, first_of_two, INTERPRET) + dot(high, second_of_two, INTERPRET)
            acc += part * scale[:, None]
        elif KIND == NF4:
            low, high = nf4_levels(codes, table_ptr, DTYPE, INTERPRET)
            acc += (dot(low, even, INTERPRET) + dot(high, odd, INTERPRET)) * scale[:, None]
        elif KIND == INT8:
            acc += dot(integers(codes, DTYPE, INTERPRET), x, INTERPRET) * scale[:, None]
        else:
            acc += dot(float8_values(codes, DTYPE, INTERPRET), x, INTERPRET) * scale[:, None]
    same = (tile_n % SPLITS)[:, None] == (tile_m // BLOCK_M)[None, :]
    acc = tl.where(same, acc, 0.0)
    sums = tl.sum(tl.sum(tl.reshape(acc, (BLOCK_N, SPLITS, SPLITS, BLOCK_M)), 2), 1)
    out_n = column + tl.arange(0, BLOCK_N)
    out_m = first + tl.arange(0, BLOCK_M)
    if BIAS:
        sums += tl.load(bias_ptr + out_n, mask=out_n < N, other=0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + out_m.to(tl.int64)[None, :] * N + out_n[:, None]
    inside = (out_m < last)[None, :] & (out_n < N)[:, None]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "groups", "scalers"])
def few_rows(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, out_ptr, table_ptr,
    M, N, width, x_stride, codes_stride, groups, scalers, scaler_size,
    KIND: tl.constexpr, ZERO: tl.constexpr, CODED: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BYTES: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, COPIES: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """``out [M, N] = x [M, K] @ weight [N, K].T + bias``.

    Args:
        x_ptr: ``[M, width]``: a word of two activations for each byte of two codes, else one activation.
        codes_ptr: bytes ``[N, width]``.
        scale_ptr: ``[N, groups]``; bytes with ``CODED``: ``(offset + code * step) ** 4``.
        zero_ptr: ``[N, groups]``, see ``ZERO``.
        ZERO: 0 none, 1 midpoints (added), 2 zero points (instead of 8).
        GROUP: bytes to a scale, a multiple of ``BYTES``; 0: one for the row.
        BYTES: of a row to a part.
        COPIES: see :func:`ao_kernels.device.levels.fill_levels`; 0: NF4 levels are looked up in registers.
        WHOLE: whether parts, and blocks of columns, fit without a rest.
    """
    few_rows_tile(
        tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M, M, 0,
        x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, out_ptr, table_ptr,
        N, width, x_stride, codes_stride, groups, scalers, scaler_size,
        KIND, ZERO, CODED, BIAS, DTYPE, GROUP, SPLITS, BLOCK_N, BLOCK_M, BYTES, STAGES, WHOLE, COPIES,
        INTERPRET,
    )  # fmt: skip
