"""Every scheme on CUDA at the sizes of real models, eager and compiled, against float64 on the device."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao_core as ao

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

SCHEMES = [
    "int8-weight-only",
    "int8-weight-only:group_size=128",
    "int8-dynamic",
    "int4-weight-only",
    "int4-weight-only:group_size=64,zero_point=integer",
    "int4-weight-only:group_size=32,zero_point=None",
    "int4-weight-only:group_size=-1",
    "int8-dynamic-int4-weight",
    "uint4",
    "nf4",
    "nf4:double_quant=False",
    "float8-weight-only",
    "float8-dynamic",
    "float8-dynamic:granularity=tensor",
]
ROWS = (1, 16, 17, 128, 4096)
SIZES = (4096, 14336, 576, 1537)
COMPILED = ((14336, 4096), (576, 1537), (1537, 576))  # (N, K)


def setup(name: str, n: int, k: int, dtype: torch.dtype) -> tuple[ao.Scheme, nn.Linear]:
    torch.manual_seed(n + k)
    module = nn.Linear(k, n, device="cuda", dtype=dtype)
    scheme = ao.parse_scheme(name)
    module.weight = nn.Parameter(scheme.quantize(module.weight), requires_grad=False)
    return scheme, module


def inputs(rows: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, k, device="cuda").to(dtype)


def check(scheme: ao.Scheme, module: nn.Linear, x: torch.Tensor, found: torch.Tensor) -> None:
    values = module.weight.dequantize().double()
    expected = F.linear(x.double(), values, module.bias.double())
    needed = min(42.0, scheme.min_linear_sqnr)
    assert found.dtype == x.dtype
    assert ao.sqnr(expected, found) > needed, f"rows {x.shape[0]}"


@pytest.mark.parametrize(("n", "k"), list(itertools.product(SIZES, SIZES)))
@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_eager(name, n, k):
    scheme, module = setup(name, n, k, torch.bfloat16)
    for rows in ROWS:
        x = inputs(rows, k, torch.bfloat16)
        check(scheme, module, x, module(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_other_dtypes(name, dtype):
    for n, k in ((4096, 4096), (1537, 576)):
        scheme, module = setup(name, n, k, dtype)
        for rows in (1, 17, 128):
            x = inputs(rows, k, dtype)
            check(scheme, module, x, module(x))


@pytest.mark.parametrize(("n", "k"), COMPILED)
@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_compiled(name, n, k):
    """One graph for all row counts, and a captured CUDA graph that gives the same."""
    scheme, module = setup(name, n, k, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for rows in ROWS:
        x = inputs(rows, k, torch.bfloat16)
        check(scheme, module, x, compiled(x))


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_captured_in_a_cuda_graph(name):
    scheme, module = setup(name, 1537, 576, torch.bfloat16)
    for rows in (1, 17, 300):
        x = inputs(rows, 576, torch.bfloat16)
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x)
        fresh = inputs(rows, 576, torch.bfloat16)
        x.copy_(fresh)
        out.fill_(float("nan"))
        graph.replay()
        check(scheme, module, fresh, out)


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_there_and_back(name, tmp_path):
    """To the CPU and back the weight is the same; what is saved on CUDA loads without it."""
    _, module = setup(name, 1537, 576, torch.bfloat16)
    values = module.weight.dequantize()
    x = inputs(5, 576, torch.bfloat16)
    out = module(x)
    ao.save(nn.Sequential(module), tmp_path / "saved")

    def build():
        return nn.Sequential(nn.Linear(576, 1537, dtype=torch.bfloat16))

    on_cpu, on_cuda = (ao.load(tmp_path / "saved", model=build, device=device) for device in ("cpu", "cuda"))
    assert torch.equal(on_cpu[0].weight.dequantize(), values.cpu())
    assert torch.equal(on_cuda[0].weight.dequantize(), values)
    assert torch.equal(on_cuda(x), out)
    moved = on_cpu.to("cuda")
    assert type(moved[0].weight) is type(module.weight)
    assert torch.equal(moved[0].weight.dequantize(), values)
    assert torch.equal(moved(x), out)
    assert torch.equal(module.to("cpu").weight.dequantize(), values.cpu())


def test_a_large_head_is_quantized_in_bounded_memory():
    """A head of 128256×4096 in bfloat16: NF4 peaks below 1.3 times its bytes, the weight itself included."""
    weight = torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16)
    for name in ("nf4", "int4-weight-only", "int4-weight-only:qparams=mse", "uint4"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - weight.nbytes
        quantized = ao.parse_scheme(name).quantize(weight)
        peak = torch.cuda.max_memory_allocated() - before
        limit = 1.3 if name == "nf4" else 1.7  # for int4 the packed codes and their tiles
        assert peak < limit * weight.nbytes, f"{name}: {peak / weight.nbytes:.2f}"
        del quantized
