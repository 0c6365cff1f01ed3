"""Scheme checks about what is stored, and how it travels: copies, files, graphs."""

from __future__ import annotations

import copy
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ao_core.checkpoint import load, save
from ao_core.convert import apply_
from ao_core.metrics import stored_bytes
from ao_core.plan import Choice, Plan
from ao_core.scheme import SCHEMES, Scheme, parse_scheme
from ao_core.tensor import QuantizedTensor
from ao_core.testing.values import fitted, gaussian


def assert_same(first: torch.Tensor, second: torch.Tensor) -> None:
    """Two quantized tensors are of one class and hold the same, bit for bit."""
    assert isinstance(first, QuantizedTensor), f"{type(first).__name__} is not quantized"
    assert isinstance(second, QuantizedTensor), f"{type(first).__name__} became {type(second).__name__}"
    assert type(first) is type(second), f"{type(first).__name__} became {type(second).__name__}"
    for what in ("shape", "dtype", "scheme"):
        one, other = getattr(first, what), getattr(second, what)
        assert one == other, f"{what} {one} became {other}"
    one, other = first.attributes(), second.attributes()
    assert one == other, f"attributes {one} became {other}"
    assert first.stored().keys() == second.stored().keys(), f"stored are {list(second.stored())}"
    for name, data in first.stored().items():
        other = second.stored()[name]
        assert (data.dtype, data.shape) == (other.dtype, other.shape), f"stored tensor {name!r} differs"
        assert torch.equal(_bits(data), _bits(other)), f"stored tensor {name!r} differs"


def _bits(data: torch.Tensor) -> torch.Tensor:
    """The bytes: torch.equal knows no float8."""
    return data.flatten().view(torch.uint8)


def check_options_round_trip(scheme: Scheme, device: torch.device) -> None:
    """A scheme is the same after its dict, JSON and its text."""
    data = json.loads(json.dumps(scheme.to_dict()))
    again = type(scheme).from_dict(data)
    assert again == scheme, f"{scheme!r} became {again!r} by its dict"
    if scheme.name in SCHEMES:
        assert parse_scheme(str(scheme)) == scheme, f"{scheme} does not parse to itself"


def check_smaller(scheme: Scheme, device: torch.device) -> None:
    """It really stores less than bfloat16 would: counted in stored bytes, not by the outer dtype."""
    weight = gaussian(128, 576, device=device, dtype=torch.bfloat16)
    stored = stored_bytes(scheme.quantize(weight))
    assert stored < weight.nbytes, f"{stored} bytes, bfloat16 takes {weight.nbytes}"


def check_flatten_round_trip(scheme: Scheme, device: torch.device) -> None:
    """``__tensor_flatten__`` and ``__tensor_unflatten__`` are inverses."""
    quantized = _quantized(scheme, device)
    names, context = quantized.__tensor_flatten__()
    hash(context)
    inner = {name: getattr(quantized, name) for name in names}
    again = type(quantized).__tensor_unflatten__(inner, context, quantized.shape, quantized.stride())
    assert_same(quantized, again)


def check_copies(scheme: Scheme, device: torch.device) -> None:
    """clone, detach and deepcopy keep everything; clone and deepcopy share no memory."""
    quantized = _quantized(scheme, device)
    module = _linear(quantized)
    for again in (quantized.clone(), quantized.detach(), copy.deepcopy(module).weight):
        assert_same(quantized, again)
    for again in (quantized.clone(), copy.deepcopy(module).weight):
        assert isinstance(again, QuantizedTensor), f"it became {type(again).__name__}"
        for name, data in again.stored().items():
            assert data.data_ptr() != quantized.stored()[name].data_ptr(), f"{name!r} is shared"


def check_to(scheme: Scheme, device: torch.device) -> None:
    """``.to(dtype)``, ``module.half()`` and ``.to(device)`` keep what is stored usable."""
    module = _linear(_quantized(scheme, device))
    values = module.weight.dequantize()
    for dtype in (torch.bfloat16, torch.float16):
        moved = copy.deepcopy(module).to(dtype)
        assert isinstance(moved.weight, QuantizedTensor), f"it became {type(moved.weight).__name__}"
        assert moved.weight.dtype == dtype, f"{moved.weight.dtype} after .to({dtype})"
        torch.testing.assert_close(moved.weight.dequantize(), values.to(dtype), rtol=0.01, atol=1e-3)
        x = gaussian(2, 100, device=device, dtype=dtype)
        assert moved(x).dtype == dtype, f"the linear gives {moved(x).dtype} after .to({dtype})"
    assert_same(module.weight, copy.deepcopy(module).to("cpu").to(device).weight)


def check_portable(scheme: Scheme, device: torch.device) -> None:
    """The layout for files holds the same values, and packing it again gives the same tensor."""
    for dtype in (torch.float32, torch.bfloat16):
        quantized = scheme.quantize(gaussian(32, 128, device=device, dtype=dtype))
        portable = quantized.portable()
        assert torch.equal(portable.dequantize(), quantized.dequantize()), "portable() changes the values"
        assert_same(portable, portable.portable())
        assert_same(quantized, portable.repacked())


def check_state_dict(scheme: Scheme, device: torch.device) -> None:
    """``torch.save``, ``torch.load(weights_only=True)``, ``load_state_dict(assign=True)``."""
    module = _linear(_quantized(scheme, device))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with torch.device("meta"):
        other = nn.Linear(100, 17)
    other.load_state_dict(state, assign=True)
    assert_same(module.weight, other.weight)
    x = gaussian(3, 100, device=device)
    assert torch.equal(module(x), other(x)), "the linear's result differs after load_state_dict"


def check_safetensors(scheme: Scheme, device: torch.device) -> None:
    """``ao_core.save`` and ``ao_core.load`` give the same tensors and the same results."""
    model: Any = nn.Sequential(nn.Linear(100, 17)).to(device)
    model[0].weight.data = fitted(model[0].weight.detach())
    apply_(model, Plan({"0": Choice(str(scheme))}))
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "saved")
        again: Any = load(
            Path(folder) / "saved", model=lambda: nn.Sequential(nn.Linear(100, 17)), device=device
        )
    assert_same(model[0].weight, again[0].weight)
    x = gaussian(3, 100, device=device)
    assert torch.equal(model(x), again(x)), "the linear's result differs after load"


def check_compile(scheme: Scheme, device: torch.device) -> None:
    """``torch.compile(fullgraph=True)`` with a dynamic row count compiles one graph and agrees."""
    module = _linear(_quantized(scheme, device))
    graphs = _Graphs()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=graphs)
    with torch.no_grad():
        for rows in (2, 5, 33):
            x = gaussian(rows, 100, device=device)
            torch.testing.assert_close(compiled(x), module(x))
    assert graphs.count == 1, f"{graphs.count} graphs for three row counts"
    torch._dynamo.reset()


def check_export(scheme: Scheme, device: torch.device) -> None:
    """``torch.export`` with a dynamic row count works and agrees."""
    module = _linear(_quantized(scheme, device))
    rows = torch.export.Dim("rows", min=2, max=64)
    x = gaussian(4, 100, device=device)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=({0: rows},))
        for count in (2, 33):
            x = gaussian(count, 100, device=device)
            torch.testing.assert_close(program.module()(x), module(x))


class _Graphs:
    """A torch.compile backend that counts graphs and compiles each with AOTAutograd."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        from torch._dynamo.backends.registry import lookup_backend

        self.count += 1
        compiled: Callable[..., object] = lookup_backend("aot_eager")(graph, inputs)
        return compiled


def _quantized(scheme: Scheme, device: torch.device) -> QuantizedTensor:
    return scheme.quantize(gaussian(17, 100, device=device))


def _linear(weight: QuantizedTensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    module.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        module.bias.copy_(gaussian(weight.shape[0], device=weight.device))
    return module


STORAGE_CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
