"""All linears of SmolLM2-135M on a CPU, quantized against float, by row count and dtype."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timing import LAYERS, interleaved, linears

import ao_core as ao

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
# dB of a linear against the float64 product with its own dequantized weight: what rounding activations costs.
SCHEMES = {
    "int8-weight-only": 45,
    "int8-dynamic": 38,
    "int4-weight-only": 45,
    "int8-dynamic-int4-weight": 38,
    "nf4": 45,
    "float8-weight-only": 45,
    "float8-dynamic": 28,
}


@pytest.fixture(scope="module", params=DTYPES)
def floats(request):
    """The float linears in one dtype."""
    return linears(DTYPES[request.param])


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(floats, scheme):
    """The same linears, quantized."""
    modules = copy.deepcopy(floats)
    ao.quantize_(modules, scheme)
    return modules


@pytest.mark.parametrize("rows", ROWS)
def test_linears(benchmark, floats, quantized, scheme, rows):
    dtype = floats[0].weight.dtype
    inputs = {k: torch.randn(rows, k, dtype=dtype) for k in {k for _, k in LAYERS.values()}}
    _check(quantized, inputs, SCHEMES[scheme])

    def run(modules):
        for module in modules:
            module(inputs[module.in_features])

    with torch.inference_mode():
        float_s, quantized_s = interleaved(lambda: run(floats), lambda: run(quantized), rounds=7)
        benchmark.group = f"210 linears of SmolLM2-135M, {str(dtype).removeprefix('torch.')}, {rows} rows"
        benchmark.extra_info["float_ms"] = float_s * 1e3
        benchmark.extra_info["ratio_to_float"] = float_s / quantized_s
        benchmark.pedantic(run, args=(quantized,), rounds=5, warmup_rounds=1)


def _check(quantized, inputs, least):
    for module in quantized[: len(LAYERS)]:
        x = inputs[module.in_features]
        expected = F.linear(x.double(), module.weight.dequantize().double())
        assert ao.sqnr(expected, module(x).double()) > least
