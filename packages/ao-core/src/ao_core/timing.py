"""How long a call takes on the device, or on the host where there is none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def microseconds(
    calls: Sequence[Callable[[], object]], device: torch.device | str, *, replays: int = 10
) -> float:
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
    if not calls:
        raise ValueError("microseconds needs at least one call to time")
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _replayed(calls, replays)
    rounds = []
    calls[0]()
    for _ in range(replays):
        start = time.perf_counter()
        for call in calls:
            call()
        rounds.append(time.perf_counter() - start)
    return min(rounds) / len(calls) * 1e6


def _replayed(calls: Sequence[Callable[[], object]], replays: int) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled outside of the capture
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:]) / len(calls)
