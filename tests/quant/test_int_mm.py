"""The exact integer product: every shape, any strides, each device, a CPU that saturates."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ao_quant import int_mm as module
from ao_quant.int_mm import int_mm

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
SIZES = [0, 1, 2, 7, 8, 16, 17, 63, 100, 576]


def codes(*shape, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8).to(device)


def column_major(a):
    return a.t().contiguous().t()


def check(a, b):
    got = int_mm(a, b)
    assert got.dtype == torch.int32
    assert got.device == a.device
    assert got.is_contiguous()
    assert torch.equal(got.cpu(), (a.cpu().long() @ b.cpu().long()).int())


@pytest.fixture(params=["as it is", "saturating CPU"])
def either_path(request, monkeypatch):
    if request.param != "as it is":
        monkeypatch.setattr(module, "_cpu_is_exact", lambda: False)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", SIZES)
def test_exact_for_every_shape(m, device):
    for k, n in itertools.product(SIZES, SIZES):
        a, b = codes(m, k, device=device), codes(k, n, device=device, seed=1)
        check(a, b)
        check(a, column_major(b))


def strided(rows, columns, device):
    """Views of one buffer: padded, stepped, transposed, expanded, overlapping."""
    buffer = codes(100_000, device=device)
    for down, across in (
        *[(columns + 3, 1), (2 * columns, 2), (columns, 1), (columns, 3)],
        *[(1, rows + 3), (2, 2 * rows), (1, rows)],
        *[(0, 1), (1, 0), (0, 0), (0, 2), (2, 0), (columns, 0), (0, rows)],
        *[(1, 1), (3, 1), (1, 3)],
    ):
        yield buffer.as_strided((rows, columns), (down, across), 5)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 100, 63), (17, 63, 100), (64, 64, 17), (33, 16, 8), (5, 1, 7), (1, 1, 40), (40, 1, 1)],
)
def test_exact_for_any_strides(m, k, n, device):
    for a, b in itertools.product(strided(m, k, device), strided(k, n, device)):
        check(a, b)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1023, 1024, 1025, 4096, 100_000])
@pytest.mark.parametrize("pair", [(-128, -128), (127, 127), (-128, 127)])
def test_exact_at_the_largest_sums(pair, k, device):
    a = torch.full((3, k), pair[0], dtype=torch.int8, device=device)
    b = torch.full((k, 5), pair[1], dtype=torch.int8, device=device)
    b[0, 0] = 1
    check(a, b)


def test_padding_for_cuda_gives_it_only_shapes_that_it_takes(monkeypatch):
    """The rules of torch's CUDA kernel, kept by a stand-in, so that any machine checks the padding."""

    def fussy(a, b):
        (m, k), n = a.shape, b.shape[1]
        if m <= 16 or k == 0 or n == 0 or k % 8 or n % 8:
            raise RuntimeError(f"refused {m}, {k}, {n}")
        calls.append((m, k, n))
        return (a.long() @ b.long()).int()

    calls = []
    monkeypatch.setattr(torch, "_int_mm", fussy)
    for m, k, n in itertools.product(SIZES, SIZES, SIZES):
        a, b = codes(m, k), codes(k, n, seed=1)
        got = module._cuda_mm(a, b)
        assert got.is_contiguous()
        assert torch.equal(got, (a.long() @ b.long()).int())
    assert (17, 576, 576) in calls
    assert (100, 576, 576) in calls


def test_exact_on_a_cpu_without_vnni():
    """Where oneDNN saturates; its environment variable is read once, hence a fresh process."""
    code = """
import torch
from ao_quant.int_mm import int_mm
for m, k, n in [(1, 576, 576), (17, 63, 100), (64, 3000, 8)]:
    a = torch.full((m, k), 127, dtype=torch.int8)
    b = torch.full((k, n), 127, dtype=torch.int8)
    assert torch.equal(int_mm(a, b).long(), a.long() @ b.long()), (m, k, n)
compiled = torch.compile(int_mm, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(a, b), int_mm(a, b))
"""
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class Product(torch.nn.Module):
    def forward(self, a, b):
        return int_mm(a, b)


def traced(how, a, b):
    if how == "fake":
        with FakeTensorMode() as mode:
            out = int_mm(mode.from_tensor(a), mode.from_tensor(b))
        assert out.shape == (a.shape[0], b.shape[1])
        return None
    if how == "compile":
        return torch.compile(int_mm, fullgraph=True, dynamic=True, backend="aot_eager")
    rows = ({0: torch.export.Dim("rows")}, None)
    strict = how == "export strictly"
    return torch.export.export(Product(), (a, b), dynamic_shapes=rows, strict=strict).module()


@pytest.mark.parametrize("how", ["compile", "export", "export strictly", "fake"])
def test_tracing_probes_the_real_cpu(how):
    """Also when it is the first use in the process; and what it learns is right for later."""
    torch.compiler.reset()
    module._probe_cpu.cache_clear()
    a, b = codes(5, 64), codes(64, 12)
    function = traced(how, a, b)
    check(a, b)
    if function is not None:
        for rows in (5, 20):
            a = codes(rows, 64)
            assert torch.equal(function(a, b), int_mm(a, b))


def test_bad_operands():
    a, b = codes(2, 3), codes(3, 4)
    with pytest.raises(TypeError, match="float32"):
        int_mm(a.float(), b)
    with pytest.raises(TypeError, match="uint8"):
        int_mm(a, b.view(torch.uint8))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(4, 3\)"):
        int_mm(a, b.t())
    with pytest.raises(ValueError, match=r"\[M, K\]"):
        int_mm(a[0], b)
    with pytest.raises(ValueError, match="one device"):
        int_mm(a, b.to("meta"))
