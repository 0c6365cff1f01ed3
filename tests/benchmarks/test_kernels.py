"""Every installed kernel of every op that can be measured, a stranger's too, against the bfloat16 linear.

On a GPU, Llama-3-8B's shapes, by replays of CUDA graphs over weights larger than the L2 cache; on a CPU,
SmolLM2's. A result is held to the op's reference before it is timed. ``--shape`` and ``--rows`` choose other
problems, ``--peers`` adds other libraries, ``--results`` and ``--baseline`` keep and compare (conftest.py).
"""

from __future__ import annotations

import functools
from dataclasses import asdict

import pytest
import torch
from device_clock import clock, feed
from kernel_results import cell_name
from peers import PEERS, Peer

import ao_core as ao
from ao_core.arguments import parse_rows, parse_shapes
from ao_core.kernels import KERNELS
from ao_core.speed import FaultyError, Meter
from ao_core.triton_support import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {
    "cuda": ("4096x4096", "14336x4096", "4096x14336"),  # N, K
    "cpu": ("576x576", "1536x576", "576x1536"),
}
ROWS = {"cuda": "1,16,128,1024", "cpu": "1,16,256"}
pytestmark = pytest.mark.benchmark(timer=clock)


def kernels():
    """``(op, kernel)`` of all that can be measured."""
    ops = {name: entry.item for name, entry in ao.OPS.entries().items() if entry.item.problem is not None}
    # Interpreted kernels are a matter of form: they take minutes.
    every = [entry.item for entry in KERNELS.entries().values() if entry.item.provider != INTERPRETED]
    found = [(ops[kernel.op], kernel) for kernel in every if kernel.op in ops]
    return sorted(found, key=lambda pair: (pair[1].op, pair[1].provider))


def pytest_generate_tests(metafunc):
    def option(name):
        return metafunc.config.getoption(name, default=None)

    sizes = parse_shapes(option("shape") or SHAPES[DEVICE.type])
    counts = parse_rows(option("rows") or ROWS[DEVICE.type])
    if "kernel" in metafunc.fixturenames:
        found = kernels()
        if not found:
            raise pytest.UsageError(
                "no kernel is installed: pip install ao-quant ao-kernels, then 'ao plugins'"
            )
        metafunc.parametrize(
            ("op", "kernel"), found, ids=lambda each: getattr(each, "provider", None) or each.name
        )
    else:
        skip = [] if option("peers") else [pytest.mark.skip(reason="--peers was not given")]
        found = [pytest.param(each, marks=skip, id=f"{each.op}-{each.name}") for each in PEERS]
        metafunc.parametrize("peer", found)
    metafunc.parametrize("shape", sizes, ids=lambda shape: "x".join(map(str, shape)))
    metafunc.parametrize("rows", counts, ids=lambda rows: f"M{rows}")


@functools.cache
def meter():
    return Meter(DEVICE)


@pytest.fixture
def record(benchmark, results):
    """Note a cell: ``record(op, provider, n, k, rows, speed or reason)``."""

    def note(op, provider, n, k, rows, found, *, peer=False):
        name = cell_name(op, n, k, rows, provider)
        if isinstance(found, str):
            results.add(name, found, peer=peer)
            return
        numbers = {key: value for key, value in asdict(found).items() if key != "rounds"}
        results.add(name, numbers, peer=peer)
        bandwidth, rate = meter().ceilings
        results.data["ceilings"] = {"gb_per_s": bandwidth / 1e9, "tflops": rate / 1e12}
        benchmark.group = f"{op}, {n}×{k}, M={rows}"
        benchmark.extra_info.update(numbers, device=results.data["about"]["device_name"])
        feed(benchmark, found.rounds)

    return note


@torch.no_grad()
def test_kernels(record, op, kernel, shape, rows):
    cell = (op.name, kernel.provider, *shape, rows)
    try:
        found = meter().kernel(op, kernel, *shape, rows)
    except ao.RejectedError as error:
        record(*cell, f"it rejects: {error}")
        pytest.skip(str(error))
    except FaultyError as error:
        record(*cell, str(error))
        pytest.fail(f"{kernel.provider} {error}")
    record(*cell, found)


@torch.no_grad()
def test_peers(record, peer: Peer, shape, rows):
    """What another library can't do, or does wrong, is its own matter: skipped, with the reason."""
    n, k = shape
    cell = (peer.op, peer.name, n, k, rows)
    try:
        found = peer.speed(meter(), n, k, rows)
    except Exception as error:  # noqa: BLE001 - a stranger's library: the reason is shown and kept
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ao.AoError) else str(error)
        record(*cell, reason, peer=True)
        pytest.skip(reason)
    record(*cell, found, peer=True)
