"""Quantized stacks of experts in torch's products: one op a call, whatever the way to call it."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import ao_core as ao
from ao_core import ops
from ao_core.testing import values
from ao_quant import experts_ops

SCHEMES = ("int4-weight-only:group_size=32", "nf4", "int8-weight-only", "float8-weight-only")
DYNAMIC = ("int8-dynamic", "int8-dynamic-int4-weight", "float8-dynamic")
gaussian = functools.partial(values.gaussian, device="cpu")
needs_grouped = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="from torch 2.10 on, on a CPU too")


def quantized(scheme, *, dtype=torch.bfloat16):
    return ao.parse_scheme(scheme).quantize(gaussian(4, 24, 64, dtype=dtype))


@pytest.fixture
def outer_calls(monkeypatch):
    """Names of the ops that a function calls, without those that they call in turn."""
    names, running, dispatch = [], [], ops._dispatch

    def watch(op, args, pinned):
        if not running:
            names.append(op.name)
        running.append(op)
        try:
            return dispatch(op, args, pinned)
        finally:
            running.pop()

    monkeypatch.setattr(ops, "_dispatch", watch)

    def calls(function):
        names.clear()
        function()
        return list(names)

    return calls


@needs_grouped
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_op_a_product(scheme, outer_calls):
    weight = quantized(scheme)
    x = gaussian(11, 64, dtype=torch.bfloat16)
    offsets = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    op = f"{scheme.split(':')[0].removesuffix('-weight-only')}_experts_linear"
    floats = weight.dequantize().double()
    ways = {
        "grouped": lambda: torch._grouped_mm(x, weight.transpose(-2, -1), offs=offsets),
        "bmm": lambda: torch.bmm(x[:8].view(4, 2, 64), weight.transpose(-2, -1)),
        "bmm from the left": lambda: torch.bmm(weight, x[:4].unsqueeze(-1)),
    }
    for way, product in ways.items():
        assert outer_calls(product) == [op], way
    found = ways["grouped"]()
    assert torch.equal(found[10:], torch.zeros_like(found[10:]))  # rows of no expert
    for expert, rows in ((1, slice(0, 3)), (3, slice(3, 10))):
        assert ao.sqnr(x[rows].double() @ floats[expert].t(), found[rows]) > 40
    expected = torch.einsum("enk,ek->en", floats, x[:4].double())
    assert ao.sqnr(expected, ways["bmm from the left"]().squeeze(-1)) > 40


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_activations_are_still_quantized(scheme):
    """What these schemes inherit from the weight-only ones would leave activations in float."""
    weight = quantized(scheme, dtype=torch.float32)
    x = gaussian(4, 5, 64)
    apart = torch.stack([F.linear(x[e], weight[e]) for e in range(4)])
    torch.testing.assert_close(torch.bmm(x, weight.transpose(-2, -1)), apart)
    in_float = torch.bmm(x, weight.dequantize().transpose(-2, -1))
    assert float((apart - in_float).norm()) > 1e-4 * float(in_float.norm())


@needs_grouped
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_whole_and_with_gradients(scheme):
    weight = quantized(scheme)
    offsets = torch.tensor([2, 2, 5, 9], dtype=torch.int32)

    def run(x, weight, offsets):
        return torch._grouped_mm(x, weight.transpose(-2, -1), offs=offsets)

    x = gaussian(9, 64, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, offsets), run(x, weight, offsets))
    grads = []
    for each in (weight, weight.dequantize()):
        leaf = x.clone().requires_grad_()
        run(leaf, each, offsets).square().sum().backward()
        grads.append(leaf.grad)
    assert ao.sqnr(grads[1], grads[0]) > 35  # bfloat16, twice


def test_sizes_that_do_not_fit_are_named():
    weight = quantized("int8-weight-only")
    with pytest.raises(RuntimeError, match="4 experts with 64 input features"):
        torch.bmm(torch.zeros(4, 2, 63, dtype=torch.bfloat16), weight.transpose(-2, -1))
    with pytest.raises(RuntimeError, match="as many offsets in int32 or int64"):
        experts_ops.INT8_EXPERTS_LINEAR(
            torch.zeros(4, 64), torch.tensor([1, 2, 4]), weight.codes, weight.scale, -1
        )
    with pytest.raises(RuntimeError, match="S a multiple of 4"):
        experts_ops.INT8_EXPERTS_LINEAR(torch.zeros(5, 64), None, weight.codes, weight.scale, -1)
