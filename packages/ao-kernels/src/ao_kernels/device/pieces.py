"""Which part of the output a program of :mod:`ao_kernels.device.from_registers` works on.

A program takes every so many pieces of the work. A piece is a tile of the output; they come in bands, so that
those that run side by side find the same weights in the L2 cache. Where the last round of tiles would leave
half of the device idle, they are cut along K: pieces are the parts, and :func:`add_tiles` adds them up.

With a stack of experts, rows are sorted by expert, and only the device knows where an expert's end: tiles are
those of the first expert, then those of the second. A program counts on from one of its tiles to the next.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def place(at, M, N, group_m, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Row and column of the output's tile ``at``: bands of ``group_m`` tiles of rows, column by column."""
    across_m = gl.cdiv(M, BLOCK_M)
    across_n = gl.cdiv(N, BLOCK_N)
    band = at // (group_m * across_n)
    band_m = gl.minimum(across_m - band * group_m, group_m)
    inside = at % (group_m * across_n)
    return (band * group_m + inside % band_m) * BLOCK_M, inside // band_m * BLOCK_N


@gluon.jit
def part_of(at, whole, all_tiles, CUT: gl.constexpr):
    """Of piece ``at`` of the work: its tile of the output, its first tile of K, and how many of these."""
    tile = at
    first = at * 0
    count = first + all_tiles
    if CUT > 1:
        if at >= whole:
            tile = whole + (at - whole) // CUT
            first = (at - whole) % CUT * gl.cdiv(all_tiles, CUT)
            count = gl.minimum(all_tiles - first, gl.cdiv(all_tiles, CUT))
    return tile, first, count


@gluon.jit
def end_of(expert, offsets_ptr, M, E):
    """Where the rows of an expert end; of those from E on, with the last row."""
    end = gl.load(offsets_ptr + gl.minimum(expert, E - 1)).to(gl.int32)
    return gl.minimum(gl.maximum(end, 0), M)


@gluon.jit
def first_expert(zero, offsets_ptr, M, E, EXPERTS: gl.constexpr):
    """What :func:`advance` goes on from; without experts, all rows. ``zero``: any integer."""
    none = zero * 0
    end = none + M
    if EXPERTS:
        end = end_of(none, offsets_ptr, M, E)
    return none, none, none, end


@gluon.jit
def advance(
    at, expert, before, start, end, offsets_ptr, M, N, E, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):
    """The expert of tile ``at``, how many tiles lie before its own, and its rows, from an earlier one's."""
    more = gl.cdiv(gl.maximum(end - start, 0), BLOCK_M) * gl.cdiv(N, BLOCK_N)
    while (at >= before + more) & (expert < E - 1):
        before += more
        expert += 1
        start = end
        end = end_of(expert, offsets_ptr, M, E)
        more = gl.cdiv(gl.maximum(end - start, 0), BLOCK_M) * gl.cdiv(N, BLOCK_N)
    return expert, before, start, end


@gluon.jit
def pieces_of_experts(
    offsets_ptr, M, N, E, EXPERTS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):
    """Tiles of the output of all experts."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    index = gl.arange(0, EXPERTS, layout)
    ends = gl.load(offsets_ptr + index, mask=index < E, other=0).to(gl.int32)
    starts = gl.load(offsets_ptr + index - 1, mask=(index > 0) & (index < E), other=0).to(gl.int32)
    rows = gl.minimum(gl.maximum(ends, 0), M) - gl.minimum(gl.maximum(starts, 0), M)
    tiles = (gl.maximum(rows, 0) + BLOCK_M - 1) // BLOCK_M
    return gl.sum(gl.where(index < E, tiles, 0), 0) * gl.cdiv(N, BLOCK_N)


@gluon.jit(do_not_specialize=["M", "group_m", "whole"])
def add_tiles(
    parts_ptr, bias_ptr, out_ptr, M, N, group_m, whole,
    CUT: gl.constexpr, BIAS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, ROWS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Tiles of ``out [M, N]`` from tile ``whole`` on: the sums of their parts in order, and the bias.

    Args:
        parts_ptr: float32 ``[tiles, CUT, BLOCK_M, BLOCK_N]``.
        ROWS: of a tile to a program.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [num_warps, 1], [1, 0])
    tile = gl.program_id(0) // (BLOCK_M // ROWS)
    row, column = place(whole + tile, M, N, group_m, BLOCK_M, BLOCK_N)
    within = gl.program_id(0) % (BLOCK_M // ROWS) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    beside = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    m = gl.expand_dims(row + within, 1)
    n = gl.expand_dims(column + beside, 0)
    parts_ptr += tile.to(gl.int64) * (CUT * BLOCK_M * BLOCK_N)
    at = gl.expand_dims(within * BLOCK_N, 1) + gl.expand_dims(beside, 0)
    total = gl.load(parts_ptr + at)
    for part in gl.static_range(1, CUT):
        total += gl.load(parts_ptr + part * BLOCK_M * BLOCK_N + at)
    if BIAS:
        total += gl.load(bias_ptr + n, mask=n < N, other=0).to(gl.float32)
    inside = (m < M) & (n < N)
    gl.store(out_ptr + m.to(gl.int64) * N + n, total.to(out_ptr.dtype.element_ty), mask=inside)
