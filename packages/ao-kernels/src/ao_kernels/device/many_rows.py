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
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * size + at, mask=inside, other=0)
    if BIAS:
        total += tl.load(bias_ptr + at % N, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def many_rows(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, bias_ptr, out_ptr, table_ptr,
    M, N, width, x_stride, plane_stride, codes_stride, groups, scalers, scaler_size,
    KIND: tl.constexpr, ZERO: tl.constexpr, CODED: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BYTES: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, SPLIT_K: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """``out [M, N] = x [M, K] @ weight [N, K].T + bias``.

    Args:
        x_ptr: activations ``[M, width]``; for codes of four bits those of even columns, and ``plane_stride``
            further on those of odd ones.
        codes_ptr: bytes ``[N, width]``.
        GROUP: bytes to a scale, a multiple of ``BYTES``; 0: one for the row.
        SPLIT_K: programs that share a row; ``out`` is then ``[SPLIT_K, M, N]``, for :func:`add_parts`.
        WHOLE: whether ``width`` is a multiple of ``BYTES`` and N one of ``BLOCK_N``.
    """
    tile_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    byte = tl.arange(0, BYTES)
    n = tile_n
    if not WHOLE:
        n = tl.minimum(n, N - 1)
    m = tl.minimum(tile_m, M - 1)
    long_n = n.to(tl.int64)
    code_ptrs = codes_ptr + (long_n * codes_stride)[:, None] + byte[None, :]
    x_ptrs = x_ptr + (m.to(tl.int64) * x_stride)[None, :] + byte[:, None]
    scale_ptrs = scale_ptr + long_n * groups
    zero_ptrs = zero_ptr + long_n * groups
    offset_ptrs = offset_ptr + long_n * scalers
    step_ptrs = step_ptr + long_n * scalers
    start = n * 0
    share = tl.cdiv(width, BYTES * SPLIT_K) * BYTES
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, width)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if KIND == INT4 or KIND == NF4:
        # Sums of their own for odd columns: the compiler makes both products run beside the decoding.
        acc_odd = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    raw = load_scales(
        scale_ptrs, zero_ptrs, offset_ptrs, step_ptrs, start + first, groups, scaler_size, ZERO, CODED, GROUP
    )
    for at in tl.range(first, last, BYTES, num_stages=STAGES):
        if WHOLE:
            codes = tl.load(code_ptrs + at)
            x = tl.load(x_ptrs + at)
            odd = x
            if KIND == INT4 or KIND == NF4:
                odd = tl.load(x_ptrs + plane_stride + at)
        else:
            codes = tl.load(code_ptrs + at, mask=(at + byte < width)[None, :], other=0)
            x = tl.load(x_ptrs + at, mask=(at + byte < width)[:, None], other=0)
            odd = x
            if KIND == INT4 or KIND == NF4:
                odd = tl.load(x_ptrs + plane_stride + at, mask=(at + byte < width)[:, None], other=0)
        if GROUP > 0:
            now = raw
            raw = load_scales(
                scale_ptrs, zero_ptrs, offset_ptrs, step_ptrs, tl.minimum(start + at + BYTES, width - 1),
                groups, scaler_size, ZERO, CODED, GROUP,
            )  # fmt: skip
            scale = scale_of(now, CODED)
        else:
            now = raw
            scale = tl.full((BLOCK_N,), 1.0, tl.float32)
        if KIND == INT4:
            middle = tl.full((BLOCK_N,), 8.0, tl.float32)
            midpoint = tl.zeros((BLOCK_N,), tl.float32)
            if ZERO == 1:
                midpoint = now[1].to(tl.float32)
            elif ZERO == 2:
                middle = now[1].to(tl.float32)
            if ZERO == 1 and GROUP == 0:
                scale = scale_of(now, CODED)
            low, high = scaled_nibbles(
                codes, middle[:, None], scale[:, None], midpoint[:, None], DTYPE, INTERPRET
            )
            acc += dot(low, x, INTERPRET)
            acc_odd += dot(high, odd, INTERPRET)
        elif KIND == NF4:
            low, high = nf4_levels(codes, table_ptr, DTYPE, INTERPRET)
            acc += dot(times(low, scale, DTYPE, INTERPRET), x, INTERPRET)
            acc_odd += dot(times(high, scale, DTYPE, INTERPRET), odd, INTERPRET)
        else:
            if KIND == INT8:
                weights = integers(codes, DTYPE, INTERPRET)
            else:
                weights = float8_values(codes, DTYPE, INTERPRET)
            if GROUP > 0:
                weights = times(weights, scale, DTYPE, INTERPRET)
            acc += dot(weights, x, INTERPRET)
    if KIND == INT4 or KIND == NF4:
        acc += acc_odd
    if GROUP == 0 and not (KIND == INT4 and ZERO == 1):
        acc *= scale_of(raw, CODED)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    out_ptrs = out_ptr + tile_m.to(tl.int64)[None, :] * N + tile_n[:, None]
    if SPLIT_K > 1:
        out_ptrs += tl.program_id(2).to(tl.int64) * M * N
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(tile_m < M)[None, :] & (tile_n < N)[:, None])
