"""Tokens a second of a Llama-3-8B-shaped model with random weights, one sequence, compiled; run by hand.

    python tests/benchmarks/llama_decode.py docs/results/h100-llama.json [SCHEME ...] [--peers [NAME ...]]

Each scheme quantizes a copy of the same model; the step is compiled whole, with CUDA graphs. Before timing,
the compiled step is checked against the same step with the weights dequantized, in eager mode.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from llama import LAYERS, random_model
from torch import nn

import ao_core as ao

SCHEMES = ("int4-weight-only:group_size=128", "nf4", "int8-weight-only", "float8-weight-only", "int8-dynamic")
TORCHAO = {"torchao int4": "Int4WeightOnlyConfig", "torchao int8": "Int8WeightOnlyConfig"}
TOKENS = 128
LEAST = 20  # dB of the logits against dequantized weights: 32 layers of 16-bit activations


@torch.no_grad()
def check(step, model: nn.Module, device: str) -> float:
    """Decibels of a few tokens' logits against the model with its weights dequantized."""
    found = run(step, model, 4, device)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(getattr(module, "weight", None), ao.QuantizedTensor):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    expected = run(plain, plain, 4, device)
    return ao.sqnr(torch.cat(expected), torch.cat(found))


def run(step, model: nn.Module, tokens: int, device: str) -> list[torch.Tensor]:
    for block in model.blocks:
        block.keys.zero_()
        block.values.zero_()
    return [
        step(torch.tensor([7 * at + 1], device=device), torch.tensor([at], device=device)).clone()
        for at in range(tokens)
    ]


@torch.no_grad()
def profile(step, steps: int = 4) -> dict[str, list[float]]:
    """Of the kernels that take longest: launches and microseconds a token."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    token, at = torch.tensor([1], device="cuda"), torch.tensor([9], device="cuda")
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(steps):
            step(token, at)
        torch.cuda.synchronize()
    on_device = [each for each in recorded.key_averages() if each.self_device_time_total > 0]
    longest = sorted(on_device, key=lambda each: -each.self_device_time_total)[:16]
    return {
        each.key[:80]: [each.count / steps, round(each.self_device_time_total / steps, 1)] for each in longest
    }


@torch.no_grad()
def measure(
    model: nn.Module, name: str, device: str, guarded: bool, checked: bool = True, profiled: bool = False
) -> dict[str, object]:
    """Seconds to compile, dB, and tokens a second of greedy decoding."""
    torch.compiler.reset()
    cuda = device == "cuda"
    options: dict[str, Any] = {"triton.cudagraphs": True} if cuda else {}
    if not guarded:
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe
    step = torch.compile(model, fullgraph=True, options=options)
    token, at = torch.tensor([1], device=device), torch.tensor([0], device=device)
    start = time.perf_counter()
    for _ in range(3):
        step(token, at).argmax(-1)
    if cuda:
        torch.cuda.synchronize()
    compiled = time.perf_counter() - start
    decibels = check(step, model, device) if checked else None
    if decibels is not None and decibels < LEAST:
        raise SystemExit(
            f"{name}: the logits are {decibels:.1f} dB from those of its weights, {LEAST} needed"
        )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for index in range(TOKENS):
            at.fill_(index)
            token = step(token, at).argmax(-1).clone()
        token.item()
        seconds.append(time.perf_counter() - start)
    row: dict[str, object] = {"what": name, "tokens_per_s": round(TOKENS / min(seconds), 1)}
    row |= {
        "compile_s": round(compiled, 1),
        "stored_bytes": sum(ao.stored_bytes(each) for each in model.parameters()),
    }
    row["decibels"] = None if decibels is None else round(decibels, 1)
    if profiled:
        row["kernels"] = profile(step)
    sys.stdout.write(f"{json.dumps(row)}\n")
    sys.stdout.flush()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("schemes", nargs="*", default=SCHEMES)
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(TORCHAO),
        help="if torchao is installed; without names, all of them",
    )
    parser.add_argument("--profile", action="store_true", help="name the kernels that take longest")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--unguarded", action="store_true", help="compile without guards on the modules")
    given = parser.parse_args()
    guarded = not given.unguarded
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [measure(random_model(device, layers=given.layers), "bfloat16", device, guarded, checked=False)]
    for name in given.schemes:
        model = random_model(device, layers=given.layers)
        ao.quantize_(model, name)
        assert isinstance(model.head.weight, ao.QuantizedTensor), "the output projection was left alone"
        rows.append(measure(model, name, device, guarded, profiled=given.profile))
        del model
    if given.peers is not None:
        from torchao import quantization

        for name in given.peers or TORCHAO:
            config = TORCHAO[name]
            model = random_model(device, layers=given.layers)
            options = {"int4_packing_format": "tile_packed_to_4d"} if "int4" in name else {}
            quantization.quantize_(model, getattr(quantization, config)(**options))
            rows.append(
                measure(
                    model, f"{name} {importlib.metadata.version('torchao')}", device, guarded, checked=False
                )
            )
    versions = {each: importlib.metadata.version(each) for each in ("torch", "triton")}
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    given.file.write_text(
        json.dumps(
            {
                "what": "one sequence decoded, Llama-3-8B shape",
                "guarded": guarded,
                "device": where,
                **versions,
                "rows": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
