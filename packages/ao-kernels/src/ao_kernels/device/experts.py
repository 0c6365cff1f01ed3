"""Stacks of experts: the kernels of single weights, with a tile's rows and weight looked up by its number.

Rows are sorted by expert, and only the device knows where an expert's end. Each program counts the tiles of
all experts: their ends are at most some kilobytes, which lie in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ao_kernels.device.few_rows import few_rows_tile
from ao_kernels.device.many_rows import many_rows_tile


@triton.jit
def _expert_of(tile, offsets_ptr, S, E, each, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert, first row and end of a tile of rows; expert E: its rows belong to none. No rows: past the end.

    Args:
        offsets_ptr: integers ``[E]``, where the rows of each expert end.
        each: rows of every expert, where there are no offsets.
        EXPERTS: a power of two greater than E; 0: there are no offsets.
    """
    if EXPERTS == 0:
        tiles = tl.cdiv(each, BLOCK_M)
        expert = tile // tiles
        first = expert * each + tile % tiles * BLOCK_M
        end = (expert + 1) * each
    else:
        index = tl.arange(0, EXPERTS)
        ends = tl.load(offsets_ptr + index, mask=index < E, other=S).to(tl.int32)
        ends = tl.minimum(tl.maximum(ends, 0), S)
        starts = tl.load(offsets_ptr + index - 1, mask=(index > 0) & (index <= E), other=0).to(tl.int32)
        starts = tl.where(index > E, S, tl.minimum(tl.maximum(starts, 0), S))
        counts = tl.cumsum((tl.maximum(ends - starts, 0) + BLOCK_M - 1) // BLOCK_M, 0)
        expert = tl.sum((counts <= tile).to(tl.int32), 0)
        mine = index == expert
        before = tl.sum(tl.where(index == expert - 1, counts, 0), 0)
        first = tl.sum(tl.where(mine, starts, 0), 0) + (tile - before) * BLOCK_M
        end = tl.sum(tl.where(mine, ends, 0), 0)
    return expert, first, end


@triton.jit
def _store_zeros(out_ptr, column, first, end, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    m = first + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    zeros = tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + m.to(tl.int64)[:, None] * N + n[None, :], zeros, mask=(m < end)[:, None] & (n < N)[None, :]
    )


@triton.jit(do_not_specialize=["S", "E", "each", "tiles", "groups", "scalers"])
def few_rows_experts(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, offsets_ptr, out_ptr, table_ptr,
    S, E, each, tiles, N, width, x_stride, codes_stride, groups, scalers, scaler_size,
    KIND: tl.constexpr, ZERO: tl.constexpr, CODED: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr,
    EXPERTS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BYTES: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """``out [S, N] = x [S, K] @ weight [E, N, K].T``, row by row with the expert's weight.

    Args as :func:`ao_kernels.device.few_rows.few_rows`, tensors of the weight ``[E * N, ...]``, and:
        offsets_ptr: integers ``[E]``, where the rows of each expert end; rows after them become zeros.
        each: rows of every expert, where there are no offsets.
        tiles: of rows, the most that there can be; a program's number counts them first.
    """
    column = tl.program_id(0) // tiles * BLOCK_N
    tile = tl.program_id(0) % tiles
    expert, first, end = _expert_of(tile, offsets_ptr, S, E, each, EXPERTS, BLOCK_M)
    if first < end:
        if expert < E:
            few_rows_tile(
                column, first, end, expert.to(tl.int64) * N,
                x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, scale_ptr, out_ptr, table_ptr,
                N, width, x_stride, codes_stride, groups, scalers, scaler_size,
                KIND, ZERO, CODED, False, DTYPE, GROUP, SPLITS, BLOCK_N, BLOCK_M, BYTES, STAGES, WHOLE,
                0, INTERPRET,
            )  # fmt: skip
        else:
            _store_zeros(out_ptr, column, first, end, N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["S", "E", "each", "tiles", "groups", "scalers"])
def many_rows_experts(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, offsets_ptr, out_ptr, table_ptr,
    S, E, each, tiles, N, width, x_stride, codes_stride, groups, scalers, scaler_size,
    KIND: tl.constexpr, ZERO: tl.constexpr, CODED: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BYTES: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The same by :func:`ao_kernels.device.many_rows.many_rows`: for many rows an expert."""
    column = tl.program_id(0) // tiles * BLOCK_N
    tile = tl.program_id(0) % tiles
    expert, first, end = _expert_of(tile, offsets_ptr, S, E, each, EXPERTS, BLOCK_M)
    if first < end:
        if expert < E:
            many_rows_tile(
                column, first, end, expert.to(tl.int64) * N, 0, S,
                x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, step_ptr, scale_ptr, out_ptr, table_ptr,
                N, width, x_stride, codes_stride, groups, scalers, scaler_size,
                KIND, ZERO, CODED, False, DTYPE, GROUP, BLOCK_N, BLOCK_M, BYTES, STAGES, WHOLE, 1, INTERPRET,
            )  # fmt: skip
        else:
            _store_zeros(out_ptr, column, first, end, N, BLOCK_M, BLOCK_N)
