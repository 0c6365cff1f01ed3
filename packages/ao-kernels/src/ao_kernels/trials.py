"""Trying tiles: whether they compute what the op's reference does, and how fast; here or in processes.

A kernel that never returns can't be stopped by the process that launched it. So each candidate runs in a
child, which is killed when it takes too long; the processes are used again for the next one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ao_core import OPS, AoError, Op, microseconds
from ao_core.child import Child, ChildError
from ao_kernels.int8_mm import dynamic_linear
from ao_kernels.tiles import Cell, Tiles, from_text, to_text
from ao_kernels.weight_linear import Codes, weight_linear

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest ``|out - reference| / |reference|``."""

PACKED = ("int4", "nf4")
_RING_BYTES = 120_000_000  # of weights in turn: more than the L2 cache
_PREPARE_S = 300
_RUNS = 10  # of the same call, which must agree to the bit: a race shows up so
_OPS = {
    "int4": "int4_weight_linear",
    "nf4": "nf4_linear",
    "int8": "int8_weight_linear",
    "float8": "float8_weight_linear",
    "int8-dynamic": "int8_dynamic_linear",
}
_Run = Callable[[Any], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why tiles are not used.

    Attributes:
        reason: what happened.
        ended: whether they took their process with them, or had to be ended: each try costs as much again.
    """

    reason: str
    ended: bool = False


class Trials(Protocol):
    """Where candidates are tried."""

    def check(self, cell: Cell, tried: Sequence[Tiles], device: torch.device) -> list[Fault | None]:
        """For each candidate why it is not used: it fails, or its result is wrong; None if it is right."""

    def measure(self, cell: Cell, tiles: Tiles, device: torch.device, replays: int) -> float | Fault:
        """Microseconds of a call."""


class Trial:
    """One cell on one device."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell, self.device = cell, device
        generator = torch.Generator(device).manual_seed(1)
        x = torch.randn(cell.rows, cell.k, generator=generator, device=device)
        self.x = x.to(getattr(torch, cell.dtype))

    @functools.cached_property
    def _expected(self) -> torch.Tensor:
        op, arguments = _problem(self.cell, self.x, 0)
        expected: torch.Tensor = op.reference(*arguments).double()
        return expected

    @functools.cached_property
    def _ring(self) -> list[_Run]:
        size = self.cell.n * self.cell.k // (2 if self.cell.kind in PACKED else 1)
        copies = max(2, min(_RING_BYTES // size, 16)) if self.device.type == "cuda" else 1
        return [_runner(self.cell, _problem(self.cell, self.x, seed)[1]) for seed in range(copies)]

    def prepare(self) -> None:
        """What takes time and is not the tiles' own: plugins, weights, the reference's result."""
        _ = self._expected

    def check(self, tiles: Tiles) -> str:
        """Why they are not used, or nothing."""
        run = _runner(self.cell, _problem(self.cell, self.x, 0)[1])
        return _reason(run, tiles, self._expected, TOLERANCE[self.x.dtype] * float(self._expected.norm()))

    def microseconds(self, tiles: Tiles, replays: int) -> float:
        """Of a call, over weights that come from memory."""
        calls = [functools.partial(run, tiles) for run in self._ring]
        return microseconds(calls, self.device, replays=replays)


class Here:
    """Tries candidates in this process: nothing ends one that hangs."""

    def check(self, cell: Cell, tried: Sequence[Tiles], device: torch.device) -> list[Fault | None]:
        """See :class:`Trials`."""
        reasons = [_trial(cell, str(device)).check(tiles) for tiles in tried]
        return [Fault(reason) if reason else None for reason in reasons]

    def measure(self, cell: Cell, tiles: Tiles, device: torch.device, replays: int) -> float | Fault:
        """See :class:`Trials`."""
        return _measured(cell, tiles, str(device), replays)


class Children:
    """Tries candidates in processes, which compile at once; only the first of them measures.

    Args:
        count: of processes, 1 or more.
        limit_s: seconds that a candidate may take to compile and to run.
        function: that answers in them.
    """

    def __init__(self, count: int, limit_s: float, function: str = "ao_kernels.trials:answer") -> None:
        self.limit_s = limit_s
        self._children = [Child(function) for _ in range(count)]
        self._ready: dict[Child, Cell] = {}  # what a child has weights of

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.close()

    def check(self, cell: Cell, tried: Sequence[Tiles], device: torch.device) -> list[Fault | None]:
        """See :class:`Trials`."""
        left: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(tried)):
            left.put(index)
        found: list[Fault | None] = [Fault("was not tried")] * len(tried)
        errors: list[BaseException] = []

        def work(child: Child) -> None:
            try:
                while not errors:
                    index = left.get_nowait()
                    answer = self._call(child, "check", cell, tried[index], device)
                    found[index] = answer if isinstance(answer, Fault) else Fault(answer) if answer else None
            except queue.Empty:
                pass
            except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
                errors.append(error)

        threads = [threading.Thread(target=work, args=(child,)) for child in self._children]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found

    def measure(self, cell: Cell, tiles: Tiles, device: torch.device, replays: int) -> float | Fault:
        """See :class:`Trials`."""
        answer = self._call(self._children[0], "measure", cell, tiles, device, replays=replays)
        if isinstance(answer, dict):
            return Fault(**answer)
        return answer if isinstance(answer, Fault) else float(answer)

    def _call(
        self, child: Child, what: str, cell: Cell, tiles: Tiles, device: torch.device, **more: Any
    ) -> Any:
        request = {"cell": dataclasses.asdict(cell), "device": str(device)}
        if self._ready.get(child) != cell:
            try:
                child.call({"what": "prepare", **request}, _PREPARE_S)
            except ChildError as error:
                raise AoError(f"a process can't make weights for {cell}: {error}. See above.") from error
            self._ready[child] = cell
        try:
            return child.call({"what": what, **request, "tiles": to_text(tiles), **more}, self.limit_s)
        except ChildError as error:
            del self._ready[child]
            return Fault(str(error), ended=True)


def answer(request: dict[str, Any]) -> Any:
    """What a child is asked: the reason of a check, or the microseconds or the fault of a measurement."""
    cell = Cell(**request["cell"])
    if request["what"] == "prepare":
        return _trial(cell, request["device"]).prepare()
    tiles = from_text(request["tiles"])
    if request["what"] == "check":
        return _trial(cell, request["device"]).check(tiles)
    found = _measured(cell, tiles, request["device"], request["replays"])
    return dataclasses.asdict(found) if isinstance(found, Fault) else found


def default_workers() -> int:
    """As many as there are processors, up to 8."""
    return min(os.cpu_count() or 1, 8)


@functools.lru_cache(maxsize=1)
def _trial(cell: Cell, device: str) -> Trial:
    return Trial(cell, torch.device(device))


def _measured(cell: Cell, tiles: Tiles, device: str, replays: int) -> float | Fault:
    try:
        return _trial(cell, device).microseconds(tiles, replays)
    except Exception as failure:  # noqa: BLE001 - a compiler's, a driver's
        return Fault(_failed(failure))


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


def _reason(run: _Run, tiles: Tiles, expected: torch.Tensor, limit: float) -> str:
    try:
        first, *again = (run(tiles) for _ in range(_RUNS if expected.is_cuda else 1))
        error = float((first.double() - expected).norm())
        stable = all(torch.equal(each, first) for each in again)
    except Exception as failure:  # noqa: BLE001 - a compiler's, a driver's
        return _failed(failure)
    if not error <= limit:  # NaN is wrong
        return f"wrong: off by {error:.3g}, {limit:.3g} allowed"
    return "" if stable else "wrong: results differ from call to call"


def _failed(failure: Exception) -> str:
    text = str(failure).strip() or type(failure).__name__
    return f"fails: {text.splitlines()[-1][:120]}"
