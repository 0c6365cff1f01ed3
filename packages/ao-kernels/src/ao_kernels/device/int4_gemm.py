"""8-bit activations, asymmetric by row, times 4-bit weights in groups: products exact in int32.

Codes become int8 in registers. What the zero points of the rows add to a group's sum is the sum of its codes,
which is taken on the way. A group's scale multiplies its sum, which is exact, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def int4_gemm(
    x_ptr, codes_ptr, x_scale_ptr, x_zero_ptr, scale_ptr, bias_ptr, out_ptr,
    M, N, K, width, x_stride, codes_stride, groups,
    GROUP: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``out [M, N] = ((x - x_zero) * x_scale) @ ((codes - 8) * scale).T + bias``.

    Args:
        x_ptr: int8 ``[M, K]``.
        codes_ptr: bytes ``[N, width]``, the even column in the low four bits.
        x_scale_ptr: float32 ``[M]``.
        x_zero_ptr: int32 ``[M]``.
        scale_ptr: float ``[N, groups]``.
        GROUP: bytes to a scale, ``BYTES``; 0: one for the row, of 2 ** 20 columns at most.
        WHOLE: whether K is a multiple of ``2 * BYTES``.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, BYTES)
    column = tl.arange(0, 2 * BYTES)
    m = tl.minimum(tile_m, M - 1)
    n = tl.minimum(tile_n, N - 1).to(tl.int64)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride + column[None, :]
    code_ptrs = codes_ptr + n[:, None] * codes_stride + byte[None, :]
    zero = tl.load(x_zero_ptr + m)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    exact = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for at in tl.range(0, width, BYTES, num_stages=STAGES):
        if WHOLE:
            x = tl.load(x_ptrs + 2 * at)
            codes = tl.load(code_ptrs + at)
        else:
            x = tl.load(x_ptrs + 2 * at, mask=(2 * at + column < K)[None, :], other=0)
            codes = tl.load(code_ptrs + at, mask=(at + byte < width)[None, :], other=0)
        low = (codes & 15).to(tl.int8) - 8
        high = (codes >> 4).to(tl.int8) - 8
        w = tl.interleave(low, high)  # [BLOCK_N, 2 * BYTES]
        if not WHOLE:
            w = tl.where((2 * at + column < K)[None, :], w, 0)
        of_zeros = zero * tl.sum(w.to(tl.int32), 1)[None, :]
        sums = tl.dot(x, w.T, out_dtype=tl.int32) - of_zeros
        if GROUP > 0:
            scale = tl.load(scale_ptr + n * groups + at // GROUP).to(tl.float32)
            acc += sums.to(tl.float32) * scale[None, :]
        else:
            exact += sums
    if GROUP == 0:
        acc = exact.to(tl.float32) * tl.load(scale_ptr + n * groups).to(tl.float32)[None, :]
    acc *= tl.load(x_scale_ptr + m)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    inside = (tile_m < M)[:, None] & (tile_n < N)[None, :]
    out_ptrs = out_ptr + tile_m.to(tl.int64)[:, None] * N + tile_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)
