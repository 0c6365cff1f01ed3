"""How fast kernels are: checked against their op's reference, then timed in turns with the float linear.

Calls go through copies of the weight in turn, together larger than the caches, as the layers of a model do.
``ao bench`` and the regression suite (``tests/benchmarks/test_kernels.py``) measure with this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ao_core.errors import AoError, OptionError, RejectedError
from ao_core.kernels import Kernel, key_of
from ao_core.ops import Op
from ao_core.timing import Rounds, in_turns, microseconds, typical

TOLERANCE = 1e-2
"""Largest ``|out - reference| / |reference|`` of a floating result that is timed; integers must be equal."""

_RING_BYTES = {"cuda": 200_000_000, "cpu": 40_000_000}  # of weights in turn: more than the caches hold
_CEILING_BYTES = {"cuda": 1_000_000_000, "cpu": 100_000_000}
_CEILING_SIZE = {"cuda": 8192, "cpu": 512}
_MOST_COPIES = 40
_ROUND_US = 20_000.0  # of a round on a host, about
_ROUNDS = 10


class FaultyError(AoError):
    """A kernel that fails, or whose result is not the reference's."""


@dataclass(frozen=True)
class Speed:
    """Of one kernel for one problem.

    Attributes:
        us: microseconds of a call: the median of ``rounds`` on CUDA, the fastest elsewhere.
        float_us: of the float linear, measured in turns with it.
        ratio: how many times as fast as the float linear it is.
        gb_per_s: bytes of arguments and result, 10**9 a second.
        tflops: operations of the product, 10**12 a second.
        share: of the device's measured ceilings: what reading the bytes at the rate of a large copy, or the
            operations at that of a large product in the dtype, would take, over what was taken. Products of
            another dtype can exceed 1.
        rounds: microseconds of a call in each round.
    """

    us: float
    float_us: float
    ratio: float
    gb_per_s: float
    tflops: float
    share: float
    rounds: tuple[float, ...]


class Meter:
    """Measures on one device, beside linears in one float dtype.

    Args:
        device: to measure on.
        dtype: of activations and of the float linear.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype = device, dtype
        self._kind = device.type if device.type in _RING_BYTES else "cpu"
        self._floats = functools.lru_cache(maxsize=4)(self._float_ring)
        self._float_rounds = functools.lru_cache(maxsize=32)(self._float_linear)

    @functools.cached_property
    def ceilings(self) -> tuple[float, float]:
        """Bytes a second of a large copy, reads and writes, and operations a second of a large product."""
        source = torch.zeros(_CEILING_BYTES[self._kind] // 4, device=self.device)
        target = torch.empty_like(source)
        # By a kernel: a copy in a CUDA graph moved 2.7 TB/s on an H200, less than kernels read there.
        copied = microseconds([lambda: torch.neg(source, out=target)], self.device)
        size = _CEILING_SIZE[self._kind]
        a = torch.randn(size, size, device=self.device).to(self.dtype)
        multiplied = microseconds([lambda: a @ a], self.device)
        return 2e6 * source.nbytes / copied, 2e6 * size**3 / multiplied

    def activations(self, m: int, k: int) -> torch.Tensor:
        """The same ``[m, k]`` whenever asked."""
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
        return x.to(self.device, self.dtype)

    def kernel(self, op: Op, kernel: Kernel, n: int, k: int, m: int) -> Speed:
        """The speed of ``kernel`` for ``m`` rows of activations and a weight ``[n, k]``.

        Raises:
            OptionError: the op makes no problem of a wanted size.
            RejectedError: the kernel rejects it; the message is its reason.
            FaultyError: the kernel fails, or its result is wrong.
        """
        if op.problem is None:
            raise OptionError(f"op {op.name} makes no problem of a wanted size, so it can't be measured.")
        problem, x = op.problem, self.activations(m, k)
        arguments = problem(x, n, 0)
        if reason := kernel.rejects(key_of(op, arguments)):
            raise RejectedError(reason)
        found = _checked(op, kernel, arguments)
        stored, moved = _bytes(arguments[op.activations :]), _bytes((*arguments, found))
        del found

        def call(seed: int) -> Callable[[], object]:
            each = arguments if seed == 0 else problem(x, n, seed)
            return lambda: kernel.fn(*each)

        try:
            return self.calls(call, stored, moved, n, k, m)
        except Exception as error:  # on CUDA, of a kernel that synchronizes: no graph can hold it
            raise FaultyError(f"is right, and can't be timed: {type(error).__name__}: {error}") from error

    def calls(
        self, make: Callable[[int], Callable[[], object]], stored: int, moved: int, n: int, k: int, m: int
    ) -> Speed:
        """The speed of calls that are not a kernel's; checking them is the caller's.

        Args:
            make: ``make(seed)`` is a call with a weight of its own; that of 0 has run before.
            stored: bytes of such a weight.
            moved: bytes of arguments and result.
            n: columns of the output.
            k: columns of the input.
            m: rows.
        """
        first = make(0)
        count = self._copies(stored, first)
        own = Rounds([first, *(make(seed) for seed in range(1, count))], self.device)
        beside = self._float_rounds(n, k, m)
        rounds, float_rounds = in_turns([own, beside], _ROUNDS)
        us, float_us = typical(rounds, self.device), typical(float_rounds, self.device)
        bandwidth, rate = self.ceilings
        floor = 1e6 * max(moved / bandwidth, 2 * n * k * m / rate)
        return Speed(
            us, float_us, float_us / us, moved / us / 1e3, 2 * n * k * m / us / 1e6, floor / us, tuple(rounds)
        )

    def _copies(self, stored: int, call: Callable[[], object]) -> int:
        room = _RING_BYTES[self._kind] // max(stored, 1)
        if self._kind == "cpu":
            room = min(room, int(_ROUND_US / max(microseconds([call], self.device, replays=2), 1e-3)))
        return max(2, min(room, _MOST_COPIES))

    def _float_ring(self, n: int, k: int) -> Sequence[torch.Tensor]:
        count = max(2, min(_RING_BYTES[self._kind] // (n * k * self.dtype.itemsize), _MOST_COPIES))
        return [torch.randn(n, k, device=self.device, dtype=self.dtype) for _ in range(count)]

    def _float_linear(self, n: int, k: int, m: int) -> Rounds:
        x, ring = self.activations(m, k), self._floats(n, k)
        count = self._copies(ring[0].nbytes, lambda: F.linear(x, ring[0]))
        return Rounds([lambda w=w: F.linear(x, w) for w in ring[:count]], self.device)  # type: ignore[misc]


def _checked(op: Op, kernel: Kernel, arguments: tuple[Any, ...]) -> Any:
    """The kernel's result, if it is the reference's."""
    try:
        found = kernel.fn(*arguments)
        expected = op.reference(*arguments)
        same = found.dtype == expected.dtype and found.shape == expected.shape
        off = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    except Exception as error:  # a stranger's
        raise FaultyError(f"fails: {type(error).__name__}: {error}") from error
    if not same:
        raise FaultyError(
            f"wrong: {found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}"
        )
    if not off <= (TOLERANCE if expected.is_floating_point() else 0):  # NaN is wrong
        raise FaultyError(f"wrong: off by {off:.2g} of the result")
    return found


def _bytes(values: Sequence[Any]) -> int:
    return sum(each.nbytes for each in values if isinstance(each, torch.Tensor))
