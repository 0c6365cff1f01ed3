"""pytest-benchmark's clock for times that a device measured: its tables and statistics are then of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_now = 0.0


def clock() -> float:
    """Seconds; they pass only in :func:`feed`."""
    return _now


def feed(benchmark: Any, rounds: Sequence[float]) -> None:
    """Let ``benchmark`` see one round for each of ``rounds``, in microseconds.

    Its test must have the mark ``benchmark(timer=clock)``.
    """
    left = iter(rounds)

    def once() -> None:
        global _now
        _now += next(left, 0.0) / 1e6

    benchmark.pedantic(once, rounds=len(rounds))
