"""Finding tiles by measuring: each candidate is checked first, then the fastest are measured for longer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ao_core import AoError
from ao_kernels.configs import (
    LEAST_PARTS,
    Decoded,
    Few,
    Gemm,
    Many,
    Parts,
    Registers,
    Specialized,
    few_tiles,
    int8_config,
    weight_config,
)
from ao_kernels.support import hopper, of_a_warp
from ao_kernels.tiles import Cell, Tiles
from ao_kernels.trials import PACKED, Fault, Trials

KINDS = ("int4", "nf4", "int8", "float8", "int8-dynamic")
_MOST_SHARED = 200_000  # bytes of shared memory that tiles may take
_SHARED = 231_000  # and those of the specialized kernel, which runs alone on a multiprocessor
_TABLE = 33_000  # of these, of NF4 levels
_SHARED_UNASKED = 48 << 10  # and one with a table, for which Triton does not ask for more
_ROUNDS = ((4, 3), (8, 3), (20, 1))  # replays, and by how much the field is cut after them


@dataclass(frozen=True)
class Found:
    """What a search found for a cell.

    Attributes:
        cell: what it was for.
        tiles: the fastest.
        microseconds: of one call with them.
        before: of one call with the tiles of the table.
        excluded: candidates that are not used, with the reason.
        ended: those of them that hung, or took their process with them.
    """

    cell: Cell
    tiles: Tiles
    microseconds: float
    before: float
    excluded: dict[str, str] = field(default_factory=dict)
    ended: dict[Tiles, str] = field(default_factory=dict)


class NoTilesError(AoError):
    """No candidate is right; ``ended`` as in :class:`Found`."""

    def __init__(self, message: str, ended: dict[Tiles, str]) -> None:
        super().__init__(message)
        self.ended = ended


def default(cell: Cell, on_hopper: bool = False) -> Tiles:
    """The tiles of the table."""
    if cell.kind == "int8-dynamic":
        return int8_config(cell.rows, cell.n)
    return weight_config(cell.kind, cell.rows, cell.n, cell.k, on_hopper)


def candidates(cell: Cell, on_hopper: bool = False) -> list[Tiles]:
    """Tiles worth measuring, those of the table first."""
    kinds = _gemm(cell.rows) if cell.kind == "int8-dynamic" else _weight(cell, on_hopper)
    return list(dict.fromkeys([default(cell, on_hopper), *kinds]))


def _weight(cell: Cell, on_hopper: bool) -> Iterator[Tiles]:
    if on_hopper:
        yield from _of_hopper(cell)
    sizes = {"int4": (64,), "nf4": (32,)}.get(cell.kind, (64, 128))
    m, tile_m = cell.rows, max(min(cell.rows, 128), 1)
    if m <= 32:
        for splits, block_n, warps, size, stages, copies in itertools.product(
            (1, 2, 4, 8), (4, 8, 16, 32, 64), (1, 2, 4), sizes, (3, 4, 5) if len(sizes) == 1 else (3, 4),
            (0, 32) if cell.kind == "nf4" else (0,),
        ):  # fmt: skip
            rows, columns = splits * block_n, splits * m
            shared = 1024 * copies + (stages - 1) * size * (rows + 4 * columns) + 4 * rows
            tiles = Few(splits, block_n, m, warps, size, stages, copies)
            if copies and not (of_a_warp(warps, columns) and rows >= 64 and shared <= _SHARED_UNASKED):
                continue
            if 16 * warps <= rows <= 128 and 8 <= max(columns, 8) <= 64 and rows * columns <= 2048:
                yield tiles
    many_sizes = (32,) if cell.kind in PACKED else (64, 128)
    if m >= 16:
        for block_n, block_m, size, stages, split_k in itertools.product(
            (64, 128), {min(tile_m, 64), tile_m, min(m, 256)}, many_sizes, (3, 4), (1, 2, 4)
        ):
            programs = -(-cell.n // block_n) * -(-m // block_m) * split_k
            columns = 2 if cell.kind in PACKED else 1
            shared = stages * size * (block_n + 2 * columns * block_m)
            if shared <= _MOST_SHARED and (split_k == 1 or programs <= 1024):
                yield Many(block_n, block_m, 8 if block_n == 128 else 4, size, stages, split_k)
    if m >= 64:
        yield Decoded()


def _of_hopper(cell: Cell) -> Iterator[Tiles]:
    if cell.rows >= 16:
        yield from _registers(cell)
        yield from _specialized(cell)
    if cell.rows >= LEAST_PARTS and (cell.rows <= 32 or few_tiles(cell.rows, cell.n)):
        yield from _parts(cell)


def _registers(cell: Cell) -> Iterator[Tiles]:
    for block_m, codes_ring, split_k in itertools.product((16, 32, 64, 128, 256), (2, 3), (1, 2, 4)):
        programs = -(-cell.n // 128) * -(-cell.rows // block_m)
        if block_m > max(cell.rows, 16) or 4 * block_m < min(cell.rows, 256):
            continue
        if split_k > 1 and programs * split_k > 264:
            continue
        staged = 2 * 2 * 64 * min(block_m, 64)  # of the output, on its way out
        for table in (False, True) if cell.kind == "nf4" else (False,):
            left = _SHARED - 128 * 128 * codes_ring - staged - (_TABLE if table else 0)
            ring = min(left // (2 * 64 * block_m), 8)
            for group_m in (1,) if cell.rows <= block_m else (1, 4):
                yield Registers(block_m, ring, codes_ring, group_m, split_k, table)


def _parts(cell: Cell) -> Iterator[Tiles]:
    size = 32 if cell.kind == "nf4" else 64
    block_m, each = 16 if cell.rows <= 16 else 32, 4 if cell.kind in PACKED else 2
    for parts, block_n, ring in itertools.product((4, 8), (16, 32, 64), (2, 3, 4)):
        shared = ring * parts * size * (block_n + each * block_m)
        shared += 32 * 8 * block_n * 2 + (_TABLE if cell.kind == "nf4" else 0)
        if shared <= _MOST_SHARED:
            yield Parts(parts, block_n, block_m, size, ring)


def _specialized(cell: Cell) -> Iterator[Tiles]:
    packed = 2 if cell.kind in PACKED else 1
    for block_m, block_n, size, split_k in itertools.product(
        (64, 128, 256), (64, 128, 256), (32, 64, 128), (1, 2, 4)
    ):
        programs = -(-cell.n // block_n) * -(-cell.rows // block_m) * split_k
        columns = size * packed
        if block_m > max(cell.rows, 64) or block_m * block_n > 256 * 128 or columns < 64:
            continue
        if split_k > 1 and programs > 528:
            continue
        for codes_ring in (2, 4):
            ring = min((_SHARED - 128 * block_n * codes_ring) // (2 * columns * (block_m + block_n)), 6)
            if ring >= 2:
                group_m = 1 if cell.rows <= block_m else 8
                yield Specialized(block_m, block_n, size, ring, codes_ring, group_m, split_k)


def _gemm(m: int) -> Iterator[Tiles]:
    if m <= 32:
        for block_n, block_k, stages in itertools.product((32, 64, 128), (128, 256, 512), (3, 4, 5)):
            block_m = max(m, 16)
            if stages * block_k * (block_m + block_n) <= _MOST_SHARED:
                yield Gemm("pointers", block_m, block_n, block_k, 4, stages, 0, 1)
    for block_m, block_n, block_k, stages, per_unit in itertools.product(
        (64, 128), (64, 128, 256), (128, 256), (3, 4), (0, 1, 2)
    ):
        shared = stages * block_k * (block_m + block_n)
        fits = shared * max(per_unit, 1) <= _MOST_SHARED + 27_000
        if fits and block_m <= max(m, 64) and not (m < 512 and per_unit):
            warps = 8 if block_m * block_n > 128 * 128 else 4
            yield Gemm(
                "copy engine", block_m, block_n, block_k, warps, stages, per_unit, 8 if per_unit else 1
            )


def search(cell: Cell, device: torch.device, trials: Trials, known: Mapping[str, str] | None = None) -> Found:
    """The fastest tiles of :func:`candidates` among those that compute what the op's reference does.

    Args:
        cell: what to find tiles for.
        device: to measure on.
        trials: where they run.
        known: tiles (their ``repr``) that are not tried, with the reason.

    Raises:
        NoTilesError: no candidate is right.
    """
    every = candidates(cell, hopper(device))
    excluded = {text: reason for text, reason in (known or {}).items() if text in set(map(repr, every))}
    ended: dict[Tiles, str] = {}

    def exclude(tiles: Tiles, fault: Fault) -> None:
        excluded[repr(tiles)] = fault.reason
        if fault.ended:
            ended[tiles] = fault.reason

    def measured(tiles: Tiles, replays: int) -> float:
        found = trials.measure(cell, tiles, device, replays)
        if isinstance(found, Fault):
            exclude(tiles, found)
            return float("nan")
        return found

    tried = [tiles for tiles in every if repr(tiles) not in excluded]
    for tiles, fault in zip(tried, trials.check(cell, tried, device), strict=True):
        if fault is not None:
            exclude(tiles, fault)
    field_ = [tiles for tiles in tried if repr(tiles) not in excluded]
    times: dict[Tiles, float] = {}
    rounds = _ROUNDS if device.type == "cuda" else ((1, len(field_) or 1),)  # interpreted: a matter of form
    for replays, cut in rounds:
        every_time = {tiles: measured(tiles, replays) for tiles in field_}
        times = {tiles: us for tiles, us in every_time.items() if repr(tiles) not in excluded}
        field_ = sorted(times, key=times.__getitem__)[: -(-len(times) // cut)]
    if not field_:
        raise NoTilesError(f"no tiles are right for {cell}: {next(iter(excluded.values()))}", ended)
    best, table = field_[0], default(cell, hopper(device))
    before = measured(table, rounds[-1][0]) if repr(table) not in excluded else float("nan")
    if not times[best] < before * 0.98 and before == before:  # noqa: PLR0124 - NaN: the table's are wrong
        best, times[table] = table, before
    return Found(cell, best, times[best], before, excluded, ended)
