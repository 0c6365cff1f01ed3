"""Every installed kernel of every op that can be measured, a stranger's too, against the float linear.

On a GPU, Llama-3-8B's shapes, by replays of CUDA graphs over weights larger than the L2 cache; on a CPU,
SmolLM2's. A result is held to the op's reference before it is timed. ``--peers`` adds other libraries.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from peers import PEERS

import ao_core as ao
from ao_core.kernels import key_of
from ao_core.testing.kernels import TOLERANCE, kernels_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
SHAPES = (
    ((4096, 4096), (14336, 4096), (4096, 14336)) if GPU else ((576, 576), (1536, 576), (576, 1536))
)  # N, K
ROWS = (1, 4, 16, 64, 128, 256, 1024, 4096) if GPU else (1, 16, 256)
RING_BYTES = 200_000_000 if GPU else 4_000_000
KERNELS = sorted(
    (name, kernel.provider)
    for name, entry in ao.OPS.entries().items()
    if entry.item.problem is not None
    for _, kernel in kernels_of(name)
    if kernel.provider != "triton_interpreted"
)
OTHERS = sorted((op, name) for op, names in PEERS.items() for name in names)


def activations(rows, k):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)


@functools.cache
def ceilings():
    """Bytes and bfloat16 operations a second: a large copy, and a large product."""
    block = torch.empty(RING_BYTES, dtype=torch.uint8, device=DEVICE)
    copy_us = ao.microseconds([block.clone], DEVICE)
    size = 8192 if GPU else 512
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    return 2 * RING_BYTES / copy_us * 1e6, 2 * size**3 / ao.microseconds([lambda: a @ a], DEVICE) * 1e6


@functools.cache
def float_us(n, k, rows):
    copies = max(2, RING_BYTES // (2 * n * k))
    ring = [torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)]
    x = activations(rows, k)
    return ao.microseconds([lambda w=w: F.linear(x, w) for w in ring], DEVICE)


def report(benchmark, calls, group, sizes, stored):
    """Time ``calls``; what the numbers mean goes along."""
    n, k, rows = sizes
    benchmark.group = f"{group}, {n}×{k}, {rows} rows"
    us = ao.microseconds(calls, DEVICE)
    bandwidth, rate = ceilings()
    moved = stored + 2 * rows * (n + k)
    floor = max(moved / bandwidth, 2 * n * k * rows / rate) * 1e6
    benchmark.extra_info.update(
        microseconds=us,
        float_microseconds=float_us(n, k, rows),
        ratio_to_float=float_us(n, k, rows) / us,
        gigabytes_per_second=moved / us / 1e3,
        teraflops=2 * n * k * rows / us / 1e6,
        share_of_ceiling=floor / us,
        device=torch.cuda.get_device_name() if GPU else "cpu",
    )

    def once():
        calls[0]()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(("op", "provider"), KERNELS)
def test_kernels(benchmark, op, provider, shape, rows):
    ((op, kernel),) = [each for each in kernels_of(op) if each[1].provider == provider]
    n, k = shape
    x = activations(rows, k)
    arguments = op.problem(x, n, 0)
    if reason := kernel.rejects(key_of(op, arguments)):
        pytest.skip(reason)
    expected, found = op.reference(*arguments).double(), kernel.fn(*arguments).double()
    limit = TOLERANCE.get(x.dtype) if arguments[0].is_floating_point() else 1e-2
    assert float((found - expected).norm()) <= limit * float(expected.norm())
    stored = sum(each.nbytes for each in arguments[1:] if isinstance(each, torch.Tensor))
    ring = [arguments, *(op.problem(x, n, seed) for seed in range(1, max(2, RING_BYTES // stored)))]
    calls = [lambda each=each: kernel.fn(*each) for each in ring]
    report(benchmark, calls, op.name, (n, k, rows), stored)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(("op", "peer"), OTHERS)
def test_peers(benchmark, request, op, peer, shape, rows):
    if not request.config.getoption("--peers", default=False) or not GPU:
        pytest.skip("--peers on a GPU")
    if peer in ("bitsandbytes", "gemlite"):
        pytest.importorskip(peer)
    n, k = shape
    x = activations(rows, k)
    if op == "int8_mm":
        if rows <= 16:
            pytest.skip("torch._int_mm takes 17 rows and more")
        x = (x * 30).round().clamp(-127, 127).to(torch.int8)
    floats = [torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) / k**0.5 for _ in range(4)]
    ring = [PEERS[op][peer](weight) for weight in floats]
    expected, found = x.double() @ floats[0].double().t(), ring[0](x).double()
    scale = (found * expected).sum() / expected.square().sum()
    assert ao.sqnr(expected, found / scale) > 14
    report(
        benchmark,
        [lambda each=each: each(x) for each in ring],
        op,
        (n, k, rows),
        n * k // (2 if op in ("int4_weight_linear", "nf4_linear") else 1),
    )
