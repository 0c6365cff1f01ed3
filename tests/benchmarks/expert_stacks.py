"""Stacks of experts: tokens routed at random times quantized stacks, beside bfloat16, as JSON and a table.

    python tests/benchmarks/expert_stacks.py FILE [--schemes NAME ...] [--tokens 1 16 128 1024 8192]

Each call is ``F.grouped_mm`` of a stack ``[E, N, K]``, one of several routings in turn, replayed as a CUDA
graph; torch's own product with the floats is timed in the same run. Small, on a CPU:

    python tests/benchmarks/expert_stacks.py FILE --stacks 4x64x64x2 --tokens 1 8
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import ao_core as ao
from ao_core import Rounds, fingerprint

SCHEMES = ("int4-weight-only:group_size=128", "nf4", "int8-weight-only", "float8-weight-only")
STACKS = ("8x14336x4096x2", "128x768x2048x8")  # Mixtral 8x7B's and Qwen3-30B-A3B's first products
ROUTINGS, TOLERANCE = 8, 1e-2


def routed(tokens: int, experts: int, each: int, seed: int, device: str) -> torch.Tensor:
    """Where each expert's rows end, int32 ``[E]``, if every token goes to ``each`` different experts."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=generator).topk(each, -1).indices
    return chosen.flatten().bincount(minlength=experts).cumsum(0).to(device, torch.int32)


def measured(stack: torch.Tensor, weight: torch.Tensor, tokens: int, each: int) -> float:
    """Microseconds of a product, after its results were compared with those of the decoded stack."""
    device = str(stack.device)
    x = torch.randn(tokens * each, stack.shape[2], generator=torch.Generator().manual_seed(tokens))
    x = x.to(device, stack.dtype)
    offsets = [routed(tokens, stack.shape[0], each, seed, device) for seed in range(ROUTINGS)]

    def product(of: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, of.transpose(1, 2), offs=at)

    if isinstance(weight, ao.QuantizedTensor):
        exact = product(weight.dequantize(), offsets[0]).double()
        off = (product(weight, offsets[0]).double() - exact).norm() / exact.norm()
        if not off <= TOLERANCE:
            raise RuntimeError(f"{weight.scheme} is off by {off:.2g} for {tokens} tokens")
    calls = [lambda at=at: product(weight, at) for at in offsets]
    return Rounds(calls, device).typical(20)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 1024, 8192])
    parser.add_argument("--stacks", nargs="+", default=STACKS, help="experts x N x K x experts of a token")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data: dict[str, Any] = {
        "command": "python tests/benchmarks/expert_stacks.py FILE",
        "fingerprint": fingerprint(device),
        "rows": [],
    }
    for text in options.stacks:
        experts, n, k, each = map(int, text.split("x"))
        stack = torch.randn(experts, n, k, device=device, dtype=torch.bfloat16) * 0.02
        floats = {tokens: measured(stack, stack, tokens, each) for tokens in options.tokens}
        for scheme in options.schemes:
            weight = ao.parse_scheme(scheme).quantize(stack)
            for tokens in options.tokens:
                us = measured(stack, weight, tokens, each)
                row = {"stack": text, "tokens": tokens, "scheme": scheme, "us": round(us, 2)}
                row |= {"bfloat16_us": round(floats[tokens], 2), "ratio": round(floats[tokens] / us, 3)}
                data["rows"].append(row)
            del weight
    temporary = options.file.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.file)
    print("| experts x N x K x chosen | tokens | bfloat16, µs | " + " | ".join(options.schemes) + " |")
    print("|" + "---|" * (3 + len(options.schemes)))
    for text in options.stacks:
        for tokens in options.tokens:
            rows = [row for row in data["rows"] if (row["stack"], row["tokens"]) == (text, tokens)]
            ratios = " | ".join(f"{row['ratio']:.2f}" for row in rows)
            print(f"| {text} | {tokens} | {rows[0]['bfloat16_us']:.1f} | {ratios} |")


if __name__ == "__main__":
    sys.exit(main())
