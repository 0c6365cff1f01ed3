"""Shared by the benchmarks: weights larger than the caches, and two things timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

LAYERS = {
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}  # (N, K) of a block of SmolLM2-135M
BLOCKS = 30


def linears(dtype: torch.dtype) -> nn.ModuleList:
    """All 210 linears of SmolLM2-135M with random weights: 212 MB in bfloat16, past every cache."""
    generator = torch.Generator().manual_seed(0)
    modules = []
    for n, k in list(LAYERS.values()) * BLOCKS:
        module = nn.Linear(k, n, bias=False, dtype=dtype)
        module.weight.data = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
        modules.append(module.requires_grad_(requires_grad=False))
    return nn.ModuleList(modules)


def best_of(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of ``rounds`` calls, after one that does not count."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def interleaved(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Fastest times of two things measured in turns, so that a noisy moment hits both."""
    pairs = [(best_of(first, 1), best_of(second, 1)) for _ in range(rounds)]
    return min(a for a, _ in pairs), min(b for _, b in pairs)
