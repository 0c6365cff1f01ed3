"""All linears of SmolLM2-135M on a CPU, quantized against float, by row count and dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from timing import LAYERS, interleaved, linears

import ao_core as ao

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)


@pytest.fixture(scope="module", params=DTYPES)
def floats(request):
    """The float linears in one dtype."""
    return linears(DTYPES[request.param])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scheme", ["int8-weight-only", "int8-dynamic"])
def test_linears(benchmark, floats, scheme, rows):
    dtype = floats[0].weight.dtype
    quantized = copy.deepcopy(floats)
    ao.quantize_(quantized, scheme)
    inputs = {k: torch.randn(rows, k, dtype=dtype) for k in {k for _, k in LAYERS.values()}}
    _check(floats, quantized, inputs)

    def run(modules):
        for module in modules:
            module(inputs[module.in_features])

    with torch.inference_mode():
        float_s, quantized_s = interleaved(lambda: run(floats), lambda: run(quantized), rounds=7)
        benchmark.group = f"210 linears of SmolLM2-135M, {str(dtype).removeprefix('torch.')}, {rows} rows"
        benchmark.extra_info["float_ms"] = float_s * 1e3
        benchmark.extra_info["ratio_to_float"] = float_s / quantized_s
        benchmark.pedantic(run, args=(quantized,), rounds=5, warmup_rounds=1)


def _check(floats, quantized, inputs):
    for before, after in list(zip(floats, quantized, strict=True))[: len(LAYERS)]:
        x = inputs[before.in_features]
        assert ao.sqnr(before(x).double(), after(x).double()) > 30
