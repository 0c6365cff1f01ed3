"""Finding tiles by measuring: each candidate is checked first, then the fastest are measured for longer."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch

from ao_core import OPS, AoError, Op, microseconds
from ao_kernels.configs import Decoded, Few, Gemm, Many, Specialized, int8_config, weight_config
from ao_kernels.int8_mm import dynamic_linear
from ao_kernels.support import hopper
from ao_kernels.tiles import Cell, Tiles
from ao_kernels.weight_linear import Codes, weight_linear

KINDS = ("int4", "nf4", "int8", "float8", "int8-dynamic")
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest ``|out - reference| / |reference|``."""

_RING_BYTES = 120_000_000  # of weights in turn: more than the L2 cache
_MOST_SHARED = 200_000  # bytes of shared memory that tiles may take
_SHARED = 231_000  # and those of the specialized kernel, which runs alone on a multiprocessor
_PACKED = ("int4", "nf4")
_RUNS = 10  # of the same call, which must agree to the bit: a race shows up so
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
    """

    cell: Cell
    tiles: Tiles
    microseconds: float
    before: float
    excluded: dict[str, str] = field(default_factory=dict)


def default(cell: Cell, on_hopper: bool = False) -> Tiles:
    """The tiles of the table."""
    if cell.kind == "int8-dynamic":
        return int8_config(cell.rows, cell.n)
    return weight_config(cell.kind, cell.rows, cell.n, on_hopper)


def candidates(cell: Cell, on_hopper: bool = False) -> list[Tiles]:
    """Tiles worth measuring, those of the table first."""
    kinds = _gemm(cell.rows) if cell.kind == "int8-dynamic" else _weight(cell, on_hopper)
    return list(dict.fromkeys([default(cell, on_hopper), *kinds]))


def _weight(cell: Cell, on_hopper: bool) -> Iterator[Tiles]:
    if on_hopper and cell.rows >= 16:
        yield from _specialized(cell)
    sizes = {"int4": (64,), "nf4": (32,)}.get(cell.kind, (64, 128))
    m, tile_m = cell.rows, max(min(cell.rows, 128), 1)
    if m <= 32:
        for splits, block_n, warps, size, stages in itertools.product(
            (1, 2, 4, 8), (4, 8, 16, 32, 64), (1, 2, 4), sizes, (3, 4, 5) if len(sizes) == 1 else (3, 4)
        ):
            rows, columns = splits * block_n, splits * m
            if 16 * warps <= rows <= 128 and 8 <= max(columns, 8) <= 64 and rows * columns <= 2048:
                yield Few(splits, block_n, m, warps, size, stages)
    many_sizes = (32,) if cell.kind in _PACKED else (64, 128)
    if m >= 16:
        for block_n, block_m, size, stages, split_k in itertools.product(
            (64, 128), {min(tile_m, 64), tile_m, min(m, 256)}, many_sizes, (3, 4), (1, 2, 4)
        ):
            programs = -(-cell.n // block_n) * -(-m // block_m) * split_k
            columns = 2 if cell.kind in _PACKED else 1
            shared = stages * size * (block_n + 2 * columns * block_m)
            if shared <= _MOST_SHARED and (split_k == 1 or programs <= 1024):
                yield Many(block_n, block_m, 8 if block_n == 128 else 4, size, stages, split_k)
    if m >= 64:
        yield Decoded()


def _specialized(cell: Cell) -> Iterator[Tiles]:
    packed = 2 if cell.kind in _PACKED else 1
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


_OPS = {
    "int4": "int4_weight_linear",
    "nf4": "nf4_linear",
    "int8": "int8_weight_linear",
    "float8": "float8_weight_linear",
    "int8-dynamic": "int8_dynamic_linear",
}
_Run = Callable[[Any], torch.Tensor]


def _problem(cell: Cell, x: torch.Tensor, seed: int) -> tuple[Op, tuple[Any, ...]]:
    """The op, and arguments with random weights."""
    op = OPS.get(_OPS[cell.kind])
    if op.problem is None:
        raise AoError(
            f"op {op.name} of the installed ao-quant can't be measured. Run pip install -U ao-quant."
        )
    return op, op.problem(x, cell.n, seed)


def _runner(cell: Cell, arguments: tuple[Any, ...]) -> _Run:
    """The call of the kernels with tiles, for arguments of the op."""
    x, codes, *rest = arguments
    if cell.kind == "int8-dynamic":
        return lambda tiles: dynamic_linear(x, codes, rest[0], None, tiles)
    if cell.kind == "int4":
        weight = Codes("int4", codes, rest[0], rest[-1], rest[1])
    elif cell.kind == "nf4":
        absmax, offset, step, _, size, scaler_size = rest
        weight = Codes("nf4", codes, absmax, size, offset=offset, step=step, scaler_size=scaler_size)
    else:
        weight = Codes(cell.kind, codes, rest[0])
    return lambda tiles: weight_linear(x, weight, None, tiles)


def _activations(cell: Cell, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(cell.rows, cell.k, generator=generator, device=device)
    dtype: torch.dtype = getattr(torch, cell.dtype)
    return x.to(dtype)


def check(cell: Cell, tried: Sequence[Tiles], device: torch.device) -> list[str]:
    """For each candidate why it is not used: it fails, or its result is wrong; empty if it is right."""
    x = _activations(cell, device)
    op, arguments = _problem(cell, x, 0)
    expected, run = op.reference(*arguments).double(), _runner(cell, arguments)
    limit = TOLERANCE[x.dtype] * float(expected.norm())
    return [_reason(run, tiles, expected, limit) for tiles in tried]


def _reason(run: _Run, tiles: Tiles, expected: torch.Tensor, limit: float) -> str:
    try:
        first, *again = (run(tiles) for _ in range(_RUNS if expected.is_cuda else 1))
        error = float((first.double() - expected).norm())
        stable = all(torch.equal(each, first) for each in again)
    except Exception as failure:  # noqa: BLE001 - a compiler's, a driver's
        text = str(failure).strip() or type(failure).__name__
        return f"fails: {text.splitlines()[-1][:120]}"
    if not error <= limit:  # NaN is wrong
        return f"wrong: off by {error:.3g}, {limit:.3g} allowed"
    return "" if stable else "wrong: results differ from call to call"


def _check_in_pool(
    cell: Cell, tried: Sequence[Tiles], device: torch.device, pool: ProcessPoolExecutor, workers: int
) -> list[str]:
    """The same in other processes, which also compile at once; if one dies the search ends with an error."""
    shares = [list(tried[start::workers]) for start in range(workers)]
    futures = [pool.submit(check, cell, share, device) for share in shares if share]
    reasons = [""] * len(tried)
    for start, future in enumerate(futures):
        try:
            found = future.result()
        except BrokenProcessPool as error:
            raise AoError(
                f"a process that checked tiles for {cell} died. Run again with --workers 0 to see where."
            ) from error
        reasons[start::workers] = found
    return reasons


def search(
    cell: Cell, device: torch.device, *, pool: ProcessPoolExecutor | None = None, workers: int = 0
) -> Found:
    """The fastest tiles of :func:`candidates` among those that compute what the op's reference does.

    Args:
        cell: what to find tiles for.
        device: to measure on.
        pool: processes that check and compile; None to do it here.
        workers: how many they are.

    Raises:
        AoError: no candidate is right.
    """
    tried = candidates(cell, hopper(device))
    if pool is not None and workers:
        reasons = _check_in_pool(cell, tried, device, pool, workers)
    else:
        reasons = check(cell, tried, device)
    excluded = {repr(tiles): reason for tiles, reason in zip(tried, reasons, strict=True) if reason}
    field_ = [tiles for tiles, reason in zip(tried, reasons, strict=True) if not reason]
    if not field_:
        raise AoError(f"no tiles are right for {cell}: {next(iter(excluded.values()))}")
    x = _activations(cell, device)
    size = cell.n * cell.k // (2 if cell.kind in _PACKED else 1)
    copies = max(2, min(_RING_BYTES // size, 16)) if device.type == "cuda" else 1
    ring = [_runner(cell, _problem(cell, x, seed)[1]) for seed in range(copies)]

    def measured(tiles: Tiles, replays: int) -> float:
        return microseconds([lambda run=run: run(tiles) for run in ring], device, replays=replays)  # type: ignore[misc]

    times: dict[Tiles, float] = {}
    rounds = _ROUNDS if device.type == "cuda" else ((1, len(field_)),)  # interpreted: a matter of form
    for replays, cut in rounds:
        times = {tiles: measured(tiles, replays) for tiles in field_}
        field_ = sorted(field_, key=times.__getitem__)[: -(-len(field_) // cut)]
    best, table = field_[0], default(cell, hopper(device))
    before = measured(table, rounds[-1][0]) if repr(table) not in excluded else float("nan")
    if not times[best] < before * 0.98 and before == before:  # noqa: PLR0124 - NaN: the table's are wrong
        best, times[table] = table, before
    return Found(cell, best, times[best], before, excluded)


def processes(workers: int) -> ProcessPoolExecutor:
    """Processes for :func:`search`, started afresh: CUDA does not outlive a fork."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def default_workers() -> int:
    """As many as there are processors, up to 8."""
    return min(os.cpu_count() or 1, 8)
