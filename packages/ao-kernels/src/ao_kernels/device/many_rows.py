"""Weights in codes times many rows of activations: decoded in registers, multiplied by the tensor cores.

Weights become bfloat16 or float16, scaled, as they would by dequantizing them; sums are float32. The result
is computed transposed, so that weights are the operand that the tensor cores take from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ao_kernels.device.decode import (
    INT4,
    INT8,
    NF4,
    dot,
    float8_values,
    integers,
    nf4_levels,
    scaled_nibbles,
    times,
)
from ao_kernels.device.scales import load_scales, scale_of


@triton.jit
def add_parts(
    parts_ptr, bias_ptr, out_ptr, size, N, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``out [M, N]``: the sum of float32 ``parts [PARTS, M, N]`` in their order, and the bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(PARTS):
        total += tl.load(parts_ptr + at, mask=inside, other=0)
        parts_ptr += size  # a multiple of it need not fit 32 bits
    if BIAS:
        total += tl.load(bias_ptr + at % N, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _halves(low, high, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """``[ROWS, 2 * BYTES]``: ``low`` and, beside it, ``high``. No value changes threads."""
    return tl.join(low, high).permute(0, 2, 1).reshape(ROWS, 2 * BYTES)


@triton.jit
def settled(acc, INTERPRET: tl.constexpr):
    """``acc``, once products have ended.

    Triton lets Hopper's products run on into the next iteration, and does not keep that one from decoding
    into the registers that they still read. It waits for a value that anything but a product reads.
    """
    if not INTERPRET:
        acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def many_rows_tile(
    column, first_row, last_row, base, part, M,
    x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, out_ptr, table_ptr,
    N, width, x_stride, codes_stride, groups, scalers, scaler_size,
    KIND: tl.constexpr, ZERO: tl.constexpr, CODED: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BYTES: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, SPLIT_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of :func:`many_rows`: columns of the output from ``column`` on, rows from ``first_row`` on.

    Scales are read in the iteration that needs them: carried over from the one before, they would keep
    weights from being read in the layout of the tensor cores' operand.

    Args:
        last_row: where rows end; nothing is stored from there on.
        base: the weight's first row among those of ``codes_ptr``: that of an expert in a stack.
        part: of ``SPLIT_K``.
        M: rows of the output.
    """
    PACKED: tl.constexpr = KIND == INT4 or KIND == NF4
    COLUMNS: tl.constexpr = 2 * BYTES if PACKED else BYTES
    tile_n = column + tl.arange(0, BLOCK_N)
    tile_m = first_row + tl.arange(0, BLOCK_M)
    byte = tl.arange(0, BYTES)
    column = tl.arange(0, COLUMNS)
    n = tile_n
    if not WHOLE:
        n = tl.minimum(n, N - 1)
    m = tl.minimum(tile_m, last_row - 1)
    long_n = n.to(tl.int64) + base
    code_ptrs = codes_ptr + (long_n * codes_stride)[:, None] + byte[None, :]
    x_ptrs = x_ptr + (m.to(tl.int64) * x_stride)[None, :] + column[:, None]
    scale_ptrs = scale_ptr + long_n * groups
    zero_ptrs = zero_ptr + long_n * groups
    offset_ptrs = offset_ptr + long_n * scalers
    step_ptrs = step_ptr + long_n * scalers
    start = n * 0
    share = tl.cdiv(width, BYTES * SPLIT_K) * BYTES
    first = part * share
    last = tl.minimum(first + share, width)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for at in tl.range(first, last, BYTES, num_stages=STAGES):
        if WHOLE:
            codes = tl.load(code_ptrs + at)
        else:
            codes = tl.load(code_ptrs + at, mask=(at + byte < width)[None, :], other=0)
        if WHOLE or PACKED:
            x = tl.load(x_ptrs + at * (COLUMNS // BYTES))
        else:
            x = tl.load(x_ptrs + at, mask=(at + byte < width)[:, None], other=0)
        raw = load_scales(
            scale_ptrs, zero_ptrs, offset_ptrs, step_ptrs, start + at, groups, scaler_size, ZERO, CODED, GROUP
        )
        if GROUP > 0:
            scale = scale_of(raw, CODED)
        else:
            scale = tl.full((BLOCK_N,), 1.0, tl.float32)
        if KIND == INT4:
            middle = tl.full((BLOCK_N,), 8.0, tl.float32)
            midpoint = tl.zeros((BLOCK_N,), tl.float32)
            if ZERO == 1:
                midpoint = raw[1].to(tl.float32)
            elif ZERO == 2:
                middle = raw[1].to(tl.float32)
            if ZERO == 1 and GROUP == 0:
                scale = scale_of(raw, CODED)
            low, high = scaled_nibbles(
                codes, middle[:, None], scale[:, None], midpoint[:, None], DTYPE, INTERPRET
            )
            weights = _halves(low, high, BLOCK_N, BYTES)
        elif KIND == NF4:
            low, high = nf4_levels(codes, table_ptr, DTYPE, INTERPRET)
            weights = _halves(low, high, BLOCK_N, BYTES)
        elif KIND == INT8:
            weights = integers(codes, DTYPE, INTERPRET)
        else:
            weights = float8_values(codes, DTYPE, INTERPRET)
        if KIND != INT4 and GROUP > 0:
            weights = times(weights, scale, DTYPE, INTERPRET)
        acc = settled(acc + dot(weights, x, INTERPRET), INTERPRET)
    if GROUP == 0 and not (KIND == INT4 and ZERO == 1):
        raw = load_scales(
            scale_ptrs, zero_ptrs, offset_ptrs, step_ptrs, start, groups, scaler_size, ZERO, CODED, GROUP
        )
        acc *= scale_of(raw, CODED)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    out_ptrs = out_ptr + tile_m.to(tl.int64)[None, :] * N + tile_n[:, None]
    if SPLIT_K > 1:
        out_ptrs += part.to(tl.int64) * M * N
    inside = (tile_m < last_row)[None, :] & (tile_n < N)[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "groups", "scalers"])
def many_rows(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, out_ptr, table_ptr,
    M, N, width, x_stride, codes_stride, groups, scalers, scaler_size,
    KIND: tl.constexpr, ZERO: tl.constexpr, CODED: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BYTES: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, SPLIT_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """``out [M, N] = x [M, K] @ weight [N, K].T + bias``.

    Args:
        x_ptr: activations ``[M, x_stride]``; for codes of four bits in the order of
            :func:`ao_kernels.device.activations.order_columns`.
        codes_ptr: bytes ``[N, width]``.
        GROUP: bytes to a scale, a multiple of ``BYTES``; 0: one for the row.
        SPLIT_K: programs that share a row; ``out`` is then ``[SPLIT_K, M, N]``, for :func:`add_parts`.
        WHOLE: whether ``width`` is a multiple of ``BYTES`` and N one of ``BLOCK_N``.
    """
    many_rows_tile(
        tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M, M, 0, tl.program_id(2), M,
        x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, out_ptr, table_ptr,
        N, width, x_stride, codes_stride, groups, scalers, scaler_size,
        KIND, ZERO, CODED, BIAS, DTYPE, GROUP, BLOCK_N, BLOCK_M, BYTES, STAGES, WHOLE, SPLIT_K, INTERPRET,
    )  # fmt: skip
