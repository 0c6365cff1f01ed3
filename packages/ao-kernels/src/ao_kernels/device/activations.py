"""Activations as the matrix kernels want them: in the order of decoded columns, or in int8."""

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
def _row_scale(largest, nans, EPS: tl.constexpr):
    """``max(absmax, EPS) / 127`` of magnitudes; NaN if the row holds one."""
    absmax = tl.where(tl.max(nans, 0) > 0, float("nan"), tl.max(largest, 0))
    return tl.div_rn(tl.where(absmax < EPS, EPS, absmax), 127.0)


@triton.jit
def _codes(values, scale):
    """int8 ``round(values / scale)``, half to even: what adding and taking off 1.5 * 2 ** 23 does."""
    return ((tl.div_rn(values, scale) + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def quantize_rows(
    x_ptr, codes_ptr, scale_ptr, K, x_stride, codes_stride,
    EPS: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """int8 codes and ``scale = max(absmax, EPS) / 127`` of each row; ``ONCE``: K is at most BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    source = x_ptr + row * x_stride
    target = codes_ptr + row * codes_stride
    block = tl.arange(0, BLOCK)
    if ONCE:
        values = tl.load(source + block, mask=block < K, other=0).to(tl.float32)
        scale = _row_scale(tl.abs(values), (values != values).to(tl.int32), EPS)
        tl.store(target + block, _codes(values, scale), mask=block < codes_stride)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        nans = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, K, BLOCK):
            values = tl.load(source + start + block, mask=start + block < K, other=0).to(tl.float32)
            nans |= (values != values).to(tl.int32)
            largest = tl.maximum(largest, tl.abs(values))
        scale = _row_scale(largest, nans, EPS)
        for start in range(0, K, BLOCK):
            values = tl.load(source + start + block, mask=start + block < K, other=0).to(tl.float32)
            tl.store(target + start + block, _codes(values, scale), mask=start + block < codes_stride)
    tl.store(scale_ptr + row, scale)
