"""The linears of every scheme on a CUDA device against the bfloat16 linear, by row count; run by hand.

    python tests/benchmarks/cuda_linears.py docs/results/h100.json [SCHEME ...]

A timing is the median replay of a CUDA graph that walks a ring of weight copies larger than the L2 cache,
divided by the ring's length. Every result is checked against float64 first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import ao_core as ao

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # (N, K)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SCHEMES = (
    "int8-weight-only",
    "int8-dynamic",
    "int4-weight-only",
    "int8-dynamic-int4-weight",
    "nf4",
    "float8-weight-only",
    "float8-dynamic",
)
RING_BYTES = 300_000_000


def measure(n: int, k: int, names: tuple[str, ...]) -> list[dict[str, float]]:
    """One row for each row count."""
    copies = max(2, RING_BYTES // (2 * n * k))
    floats = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5 for _ in range(copies)]
    schemes = {name: ao.parse_scheme(name) for name in names}
    rings = {name: [scheme.quantize(w) for w in floats] for name, scheme in schemes.items()}
    rows = []
    for m in ROWS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        row: dict[str, float] = {"m": m, "n": n, "k": k}
        row["bfloat16"] = ao.microseconds(
            [lambda w=w, x=x: F.linear(x, w) for w in floats], "cuda", replays=20
        )
        for name, ring in rings.items():
            expected = x.double() @ ring[0].dequantize().double().t()
            found = ao.sqnr(expected, F.linear(x, ring[0]))
            if found < min(42, schemes[name].min_linear_sqnr):
                raise SystemExit(f"{name} is wrong at m={m}: {found:.1f} dB")
            row[name] = ao.microseconds([lambda w=w, x=x: F.linear(x, w) for w in ring], "cuda", replays=20)
        rows.append(row)
    return rows


def main(out: str, *names: str) -> None:
    """Measure, print a Markdown table, write ``out``."""
    names = names or SCHEMES
    rows = [row for shape in SHAPES for row in measure(*shape, names)]
    print("| M | weight N×K | bfloat16, µs | " + " | ".join(names) + " |")
    print("|---" * (3 + len(names)) + "|")
    for r in rows:
        ratios = " | ".join(f"{r['bfloat16'] / r[name]:.2f}" for name in names)
        print(f"| {r['m']} | {r['n']}×{r['k']} | {r['bfloat16']:.1f} | {ratios} |")
    data = {
        "command": "python tests/benchmarks/cuda_linears.py FILE [SCHEME ...]",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": rows,
    }
    Path(out).write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
