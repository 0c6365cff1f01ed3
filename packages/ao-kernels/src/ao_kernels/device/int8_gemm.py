"""int8 and float8 matrix products on the tensor cores, and scaled ones: int8 exact in int32.

float8 products are summed in float32. Hopper's tensor cores keep some 14 bits of a sum of their own, so it is
added to one in full after 128 columns at most.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile_of(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tiles in an order that keeps ``GROUP_M`` rows of tiles in the L2 cache."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = index // (GROUP_M * tiles_n) * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    return first + index % (GROUP_M * tiles_n) % size, index % (GROUP_M * tiles_n) // size


@triton.jit
def _finish(
    acc, out_ptr, x_scale_ptr, scale_ptr, bias_ptr, m, n, M, N, SCALED: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Scale (0: not at all, 1: rows, 2: columns too), add the bias, store."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    if SCALED > 0:
        rows = tl.load(x_scale_ptr + m, mask=m < M, other=0).to(tl.float32)
        result = acc.to(tl.float32) * rows[:, None]
        if SCALED == 2:
            columns = tl.load(scale_ptr + n, mask=n < N, other=0).to(tl.float32)
            result *= columns[None, :]
        if BIAS:
            result += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[None, :]
    else:
        result = acc
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product(x, w, acc, FLOAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """``acc + x @ w``."""
    if FLOAT:
        IMPRECISE: tl.constexpr = BLOCK_K if BLOCK_K < 128 else 128
        acc = tl.dot(x, w, acc, max_num_imprecise_acc=IMPRECISE)
    else:
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def int8_gemm(
    x_ptr, w_ptr, out_ptr, x_scale_ptr, scale_ptr, bias_ptr, M, N, K, x_stride, w_stride,
    FLOAT: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """``out [M, N] = x [M, K] @ w [N, K].T``, rows in any distance; ``WHOLE``: K is a multiple of BLOCK_K.

    ``FLOAT``: x and w are float8, else int8.
    """
    tile_m, tile_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    w_ptrs = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * w_stride + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if FLOAT else tl.int32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if WHOLE:
            x = tl.load(x_ptrs + start)
            w = tl.load(w_ptrs + start)
        else:
            x = tl.load(x_ptrs + start, mask=(start + k < K)[None, :], other=0.0)
            w = tl.load(w_ptrs + start, mask=(start + k < K)[:, None], other=0.0)
        acc = _product(x, w, acc, FLOAT, BLOCK_K)
    _finish(acc, out_ptr, x_scale_ptr, scale_ptr, bias_ptr, m, n, M, N, SCALED, BIAS)


@triton.jit
def int8_gemm_copy_engine(
    x_desc, w_desc, out_ptr, x_scale_ptr, scale_ptr, bias_ptr, M, N, K, programs,
    FLOAT: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same by the copy engine: operands are tensor descriptors ``[M, K]`` and ``[N, K]``; persistent."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles, programs):
        tile_m, tile_n = _tile_of(index, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if FLOAT else tl.int32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            x = x_desc.load([tile_m * BLOCK_M, start])
            w = w_desc.load([tile_n * BLOCK_N, start])
            acc = _product(x, w.T, acc, FLOAT, BLOCK_K)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        _finish(acc, out_ptr, x_scale_ptr, scale_ptr, bias_ptr, m, n, M, N, SCALED, BIAS)
