"""How long a call takes on the device, or on the host where there is none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Calls = Sequence[Callable[[], object]]


def microseconds(calls: Calls, device: torch.device | str, *, replays: int = 10) -> float:
    """How long one of ``calls`` takes, in microseconds.

    On CUDA: the median replay of a graph of all of them in turn, over their number. Give each call weights of
    its own, together larger than the L2 cache, to have them read from memory. Elsewhere: the fastest of
    ``replays`` rounds, after one that does not count.

    Args:
        calls: at least one. On CUDA they must be capturable: no synchronization, no new shapes.
        device: where they run.
        replays: rounds that count.

    Raises:
        ValueError: no calls.
    """
    return Rounds(calls, device).typical(replays)


class Rounds:
    """Calls that are timed together, again and again; on CUDA they are captured once, as a graph.

    Args:
        calls: see :func:`microseconds`.
        device: where they run.

    Raises:
        ValueError: no calls.
    """

    def __init__(self, calls: Calls, device: torch.device | str) -> None:
        if not calls:
            raise ValueError("microseconds needs at least one call to time")
        self.calls, self.device = calls, torch.device(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self._graph = _captured(calls)
        else:
            calls[0]()

    def once(self) -> float:
        """Microseconds of a call, the mean over all of them in turn."""
        if self._graph is not None:
            with torch.cuda.device(self.device):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                self._graph.replay()
                end.record()
                torch.cuda.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / len(self.calls)
        begin = time.perf_counter()
        for call in self.calls:
            call()
        return (time.perf_counter() - begin) / len(self.calls) * 1e6

    def typical(self, replays: int) -> float:
        """Microseconds of a call, from ``replays`` rounds: see :func:`microseconds`."""
        (found,) = in_turns([self], replays)
        return typical(found, self.device)


def in_turns(series: Sequence[Rounds], replays: int) -> list[list[float]]:
    """Rounds of each, in turns, so that a slower clock hits all; on CUDA the first two do not count."""
    extra = 2 if series[0].device.type == "cuda" else 0
    rounds = [[each.once() for each in series] for _ in range(replays + extra)]
    return [list(column) for column in zip(*rounds[extra:], strict=True)]


def typical(rounds: Sequence[float], device: torch.device) -> float:
    """The median on CUDA; on a host, which has other work to do, the fastest."""
    return statistics.median(rounds) if device.type == "cuda" else min(rounds)


def _captured(calls: Calls) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled outside of the capture
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
