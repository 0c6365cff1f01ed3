"""Activations as the matrix kernels want them: in the order of decoded columns, or in 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_columns(
    x_ptr, out_ptr, K, x_stride, out_stride, BYTES: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``x [M, K]`` as ``[M, out_stride]``: of every ``2 * BYTES`` columns first the even, then the odd.

    That is the order of weights, two to a byte, decoded ``BYTES`` at a time. Columns from K on are zero.
    """
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = x_ptr + row * x_stride + 2 * byte
    even = tl.load(source, mask=2 * byte < K, other=0)
    odd = tl.load(source + 1, mask=2 * byte + 1 < K, other=0)
    target = out_ptr + row * out_stride + byte // BYTES * (2 * BYTES) + byte % BYTES
    tl.store(target, even.to(DTYPE), mask=2 * byte < out_stride)
    tl.store(target + BYTES, odd.to(DTYPE), mask=2 * byte < out_stride)


@triton.jit
def _row_scale(largest, nans, EPS: tl.constexpr, LARGEST: tl.constexpr):
    """``max(absmax, EPS) / LARGEST`` of magnitudes; NaN if the row holds one."""
    absmax = tl.where(tl.max(nans, 0) > 0, float("nan"), tl.max(largest, 0))
    return tl.div_rn(tl.where(absmax < EPS, EPS, absmax), LARGEST)


@triton.jit
def _nearest(values):
    """Whole numbers, half to even: what adding and taking off 1.5 * 2 ** 23 does."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def _codes(values, scale, TYPE: tl.constexpr, LARGEST: tl.constexpr, INTERPRET: tl.constexpr):
    """``values / scale`` as int8, or as float8 of at most ``LARGEST``."""
    ratio = tl.div_rn(values, scale)
    if TYPE == tl.int8:
        codes = _nearest(ratio)
    else:
        codes = tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST)
        if INTERPRET:  # it rounds half up: here to the multiples of an eighth of the power of two below
            power = (codes.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            step = tl.maximum(power, 0.015625) * 0.125
            codes = _nearest(codes / step) * step
    return codes.to(TYPE)


@triton.jit
def quantize_rows(
    x_ptr, codes_ptr, scale_ptr, K, x_stride, codes_stride,
    EPS: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Codes in int8 or float8, and ``scale = max(absmax, EPS) / LARGEST`` of each row.

    ``ONCE``: K is at most BLOCK.
    """
    TYPE: tl.constexpr = codes_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    source = x_ptr + row * x_stride
    target = codes_ptr + row * codes_stride
    block = tl.arange(0, BLOCK)
    if ONCE:
        values = tl.load(source + block, mask=block < K, other=0).to(tl.float32)
        scale = _row_scale(tl.abs(values), (values != values).to(tl.int32), EPS, LARGEST)
        codes = _codes(values, scale, TYPE, LARGEST, INTERPRET)
        tl.store(target + block, codes, mask=block < codes_stride)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        nans = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, K, BLOCK):
            values = tl.load(source + start + block, mask=start + block < K, other=0).to(tl.float32)
            nans |= (values != values).to(tl.int32)
            largest = tl.maximum(largest, tl.abs(values))
        scale = _row_scale(largest, nans, EPS, LARGEST)
        for start in range(0, K, BLOCK):
            values = tl.load(source + start + block, mask=start + block < K, other=0).to(tl.float32)
            codes = _codes(values, scale, TYPE, LARGEST, INTERPRET)
            tl.store(target + start + block, codes, mask=start + block < codes_stride)
    tl.store(scale_ptr + row, scale)


@triton.jit
def round_tokens(x_ptr, out_ptr, K, x_stride, out_stride, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """Each row rounded to what 256 asymmetric int8 codes stand for, in the dtype of ``out``.

    The range holds zero; the scale is at least ``EPS``. A row with NaN becomes NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    source = x_ptr + row * x_stride
    target = out_ptr + row * out_stride
    block = tl.arange(0, BLOCK)
    least = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        values = tl.load(source + start + block, mask=start + block < K, other=0).to(tl.float32)
        nans |= (values != values).to(tl.int32)
        least = tl.minimum(least, values)
        largest = tl.maximum(largest, values)
    low = tl.min(least, 0)
    scale = tl.div_rn(tl.max(largest, 0) - low, 255.0)
    scale = tl.where(scale < EPS, EPS, scale)
    scale = tl.where(tl.max(nans, 0) > 0, float("nan"), scale)
    zero = tl.minimum(tl.maximum(-128.0 - _nearest(tl.div_rn(low, scale)), -128.0), 127.0)
    for start in range(0, K, BLOCK):
        values = tl.load(source + start + block, mask=start + block < K, other=0).to(tl.float32)
        codes = tl.minimum(tl.maximum(_nearest(tl.div_rn(values, scale)) + zero, -128.0), 127.0)
        rounded = ((codes - zero) * scale).to(out_ptr.dtype.element_ty)
        tl.store(target + start + block, rounded, mask=start + block < K)
