"""Weights in codes written out as floats, for a float matrix product over many rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ao_kernels.device.decode import (
    INT4,
    INT8,
    NF4,
    above,
    float8_values,
    integers,
    nf4_levels,
    nibbles,
)
from ao_kernels.device.scales import load_scales, scale_of


@triton.jit(do_not_specialize=["groups", "scalers", "N"])
def dequantize(
    codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, out_ptr, table_ptr,
    K, width, codes_stride, groups, scalers, scaler_size,
    KIND: tl.constexpr, ZERO: tl.constexpr, CODED: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BYTES: tl.constexpr, N, INTERPRET: tl.constexpr,
):  # fmt: skip
    """``out [N, K]``; a program writes ``ROWS`` rows of ``BYTES`` bytes, which share a group.

    ``DTYPE`` is what codes become before they are scaled in float32: exact, but for levels of NF4.
    """
    down = tl.cdiv(N, ROWS)
    n = tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)
    n = tl.minimum(n, N - 1).to(tl.int64)
    at = tl.program_id(0) // down * BYTES
    byte = at + tl.arange(0, BYTES)
    codes = tl.load(
        codes_ptr + n[:, None] * codes_stride + byte[None, :], mask=(byte < width)[None, :], other=0
    )
    raw = load_scales(
        scale_ptr + n * groups, zero_ptr + n * groups, offset_ptr + n * scalers, step_ptr + n * scalers,
        tl.zeros((ROWS,), tl.int32) + at, groups, scaler_size, ZERO, CODED, GROUP,
    )  # fmt: skip
    scale = scale_of(raw, CODED)[:, None]
    if KIND == INT4:
        low, high, _ = nibbles(codes, DTYPE, INTERPRET)
        middle = tl.full((ROWS,), 8.0, tl.float32)
        midpoint = tl.zeros((ROWS,), tl.float32)
        if ZERO == 1:
            midpoint = raw[1].to(tl.float32)
        elif ZERO == 2:
            middle = raw[1].to(tl.float32)
        middle = (middle + above(DTYPE))[:, None]
        low = (low.to(tl.float32) - middle) * scale + midpoint[:, None]
        high = (high.to(tl.float32) - middle) * scale + midpoint[:, None]
        values = tl.interleave(low, high)
        column = 2 * at + tl.arange(0, 2 * BYTES)
    elif KIND == NF4:
        low, high = nf4_levels(codes, table_ptr, DTYPE, INTERPRET)
        values = tl.interleave(low.to(tl.float32) * scale, high.to(tl.float32) * scale)
        column = 2 * at + tl.arange(0, 2 * BYTES)
    else:
        if KIND == INT8:
            values = integers(codes, DTYPE, INTERPRET).to(tl.float32) * scale
        else:
            values = float8_values(codes, DTYPE, INTERPRET).to(tl.float32) * scale
        column = byte
    values = values.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n[:, None] * K + column[None, :], values, mask=(column < K)[None, :])
