"""Writing into what a quantized layer returned, with every scheme, by every path that computes here."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import ao_core as ao

DENSE = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
EVERY = [name for name in sorted(ao.schemes()) if ao.parse_scheme(name).rejects_values(DENSE) is None]
WEIGHT_ONLY = [name for name in EVERY if ao.parse_scheme(name).weight_only]
PATHS = {"chosen": contextlib.nullcontext, "reference": lambda: ao.use_provider("reference")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", EVERY)
def test_an_activation_in_place(scheme, path, dtype):
    """``nn.ReLU(inplace=True)`` behind a linear, for inputs of one to three dimensions."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True)).to(dtype)
    ao.quantize_(model, scheme)
    linear = model[0]
    for shape in ((64,), (3, 64), (2, 3, 64)):
        x = torch.randn(shape, dtype=dtype).requires_grad_()
        upstream = torch.randn(shape, dtype=dtype)
        with PATHS[path]():
            before = linear(x).detach()
            out = model(x)
            out.backward(upstream)
        assert torch.equal(out, before.relu())
        reached = upstream.double() * (before > 0)
        close(x.grad, reached @ linear.weight.dequantize().double())
        close(linear.bias.grad, reached.reshape(-1, 64).sum(0))
        linear.bias.grad = None


def close(found, expected):
    assert (found.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Conv1d(16, 64, 4), (2, 16, 8)), (nn.Conv2d(4, 64, 4), (2, 4, 8, 8))]
)
def test_a_convolution(module, shape, scheme):
    model = nn.Sequential(copy.deepcopy(module))
    ao.quantize_(model, scheme, include="0")
    weight = model[0].weight
    assert isinstance(weight, ao.QuantizedTensor)
    x = torch.randn(shape).requires_grad_()
    before = model(x).detach()
    out = model(x).mul_(2)
    assert torch.equal(out, 2 * before)
    out.sum().backward()
    wide = x.detach().double().requires_grad_()
    convolution = {3: nn.functional.conv1d, 4: nn.functional.conv2d}[len(shape)]
    convolution(wide, weight.dequantize().double()).sum().mul(2).backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_an_embedding(scheme):
    model, ids = nn.Sequential(nn.Embedding(64, 64)), torch.tensor([[1, 63], [7, 7]])
    ao.quantize_(model, scheme, include="0")
    values = model[0].weight.dequantize()[ids]
    assert torch.equal(model(ids).mul_(2), 2 * values)
    assert torch.equal(model(ids), values)
