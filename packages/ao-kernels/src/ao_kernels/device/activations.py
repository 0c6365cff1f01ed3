"""Activations as the matrix kernels want them: in two planes, or quantized to int8, one pass each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_planes(x_ptr, out_ptr, K, width, x_stride, plane_stride, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """``x [M, K]`` to its even columns and, ``plane_stride`` on, the odd ones: ``[M, width]`` each."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = x_ptr + row * x_stride + 2 * column
    even = tl.load(source, mask=2 * column < K, other=0)
    odd = tl.load(source + 1, mask=2 * column + 1 < K, other=0)
    target = out_ptr + row * width + column
    tl.store(target, even.to(DTYPE), mask=column < width)
    tl.store(target + plane_stride, odd.to(DTYPE), mask=column < width)


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
