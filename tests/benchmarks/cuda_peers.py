"""The linears of every scheme on a CUDA device beside other libraries', in one run; run by hand.

    python tests/benchmarks/cuda_peers.py docs/results/h100-peers.json [SECONDS]

Timed as in cuda_linears.py. bitsandbytes and gemlite are measured where they are installed; int4 by torch
(tinygemm) and int8 by cuBLAS come with torch. A result is compared with the float product before
it is timed. When SECONDS are over, what is left is not measured: some libraries tune themselves for minutes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from cuda_linears import SHAPES, graph_us

import ao_core as ao

ROWS = (1, 16, 128, 4096)
RING_BYTES = 200_000_000
Linear = Callable[[torch.Tensor], torch.Tensor]


def ours(scheme: str) -> Callable[[torch.Tensor], Linear]:
    parsed = ao.parse_scheme(scheme)

    def make(weight: torch.Tensor) -> Linear:
        quantized = parsed.quantize(weight)
        return lambda x: F.linear(x, quantized)

    return make


def tinygemm(weight: torch.Tensor) -> Linear:
    with ao.use_provider("torch"):
        quantized = ao.parse_scheme("int4-weight-only:qparams=minmax").quantize(weight)

    def run(x: torch.Tensor) -> torch.Tensor:
        with ao.use_provider("torch"):
            return F.linear(x, quantized)

    return run


def bitsandbytes(weight: torch.Tensor) -> Linear:
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)


def gemlite_int4(weight: torch.Tensor) -> Linear:
    from gemlite.helper import A16W4_HQQ_INT

    groups = weight.float().view(-1, 128)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / 15
    zero = -low / scale
    codes = (groups / scale + zero).round().clamp(0, 15).to(torch.uint8).view(weight.shape)
    shape = (weight.shape[0], -1)
    made = A16W4_HQQ_INT(device="cuda:0", dtype=torch.bfloat16)
    return made.from_weights(codes, scale.bfloat16().view(shape), zero.bfloat16().view(shape))


def gemlite_int8(weight: torch.Tensor) -> Linear:
    from gemlite.helper import A16W8_INT8

    return A16W8_INT8(device="cuda:0", dtype=torch.bfloat16).from_weights(weight)


def gemlite_int8_dynamic(weight: torch.Tensor) -> Linear:
    from gemlite.helper import A8W8_int8_dynamic

    return A8W8_int8_dynamic(device="cuda:0", dtype=torch.bfloat16).from_weights(weight)


def cublas_int8(weight: torch.Tensor) -> Linear:
    """The raw product alone: activations are codes already."""
    codes = (weight / weight.abs().amax() * 127).round().to(torch.int8)
    return lambda x: torch._int_mm(x, codes.t())


def our_int8(weight: torch.Tensor) -> Linear:
    from ao_kernels.int8_mm import scaled_mm

    codes = (weight / weight.abs().amax() * 127).round().to(torch.int8)
    return lambda x: scaled_mm(x, codes, None, None, None, torch.int32)


CONTENDERS: dict[str, dict[str, Callable[[torch.Tensor], Linear]]] = {
    "int4, group 128": {
        "ao": ours("int4-weight-only:qparams=minmax"),
        "tinygemm": tinygemm,
        "gemlite": gemlite_int4,
    },
    "nf4": {"ao": ours("nf4"), "bitsandbytes": bitsandbytes},
    "int8 weights": {"ao": ours("int8-weight-only"), "gemlite": gemlite_int8},
    "float8 weights": {"ao": ours("float8-weight-only")},
    "int8 dynamic": {"ao": ours("int8-dynamic"), "gemlite": gemlite_int8_dynamic},
    "int8 product, raw": {"ao": our_int8, "cuBLAS": cublas_int8},
}


def microseconds(linears: list[Linear], weight: torch.Tensor, m: int, raw: bool) -> float | str:
    """Of one call with ``m`` rows; or why not."""
    x = torch.randn(m, weight.shape[1], device="cuda", dtype=torch.bfloat16)
    if raw:
        x = (x * 30).clamp(-127, 127).to(torch.int8)
    try:
        found, expected = linears[0](x).double(), x.double() @ weight.double().t()
        ratio = float((found * expected).sum() / (expected * expected).sum())
        if not ao.sqnr(expected, found / ratio) > 14:
            return "wrong"
        return graph_us([lambda linear=linear: linear(x) for linear in linears])
    except Exception as error:  # noqa: BLE001 - another library's, which the table names
        return f"{type(error).__name__}: {error}"[:90]


def measure(n: int, k: int, names: tuple[str, ...], rows: list[dict[str, object]], until: float) -> None:
    """Add what ``names`` take to the rows of this shape, one for each kind and row count."""
    copies = max(2, RING_BYTES // (2 * n * k))
    floats = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5 for _ in range(copies)]
    mine = {(row["what"], row["m"]): row for row in rows if (row["n"], row["k"]) == (n, k)}
    for name in names:
        for what, makers in CONTENDERS.items():
            if name not in makers or time.time() > until:
                continue
            try:
                ring = [makers[name](weight) for weight in floats * 2]  # codes take half of the bytes or less
            except Exception as error:  # noqa: BLE001 - as above
                print(f"{name}: {type(error).__name__}: {error}"[:150])
                continue
            for m in ROWS:
                if time.time() < until:
                    mine[what, m][name] = microseconds(ring, floats[0], m, raw="raw" in what)


def float_rows(n: int, k: int) -> list[dict[str, object]]:
    """The rows of a shape with the float product's time."""
    ring = [
        torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(RING_BYTES // (2 * n * k) + 1)
    ]
    plain: list[Linear] = [lambda x, weight=weight: F.linear(x, weight) for weight in ring]
    base = {m: microseconds(plain, ring[0], m, raw=False) for m in ROWS}
    return [{"what": what, "m": m, "n": n, "k": k, "bfloat16": base[m]} for what in CONTENDERS for m in ROWS]


def save(rows: list[dict[str, object]], out: str) -> None:
    """Write what there is."""
    data = {
        "command": "python tests/benchmarks/cuda_peers.py FILE",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": rows,
    }
    Path(out).write_text(json.dumps(data, indent=1) + "\n")


def main(out: str, seconds: str = "3600") -> None:
    """Measure, print a Markdown table, write ``out``."""
    until = time.time() + float(seconds)
    shapes = sorted(SHAPES, reverse=True)
    rows = [row for shape in shapes for row in float_rows(*shape)]
    for names in (("ao", "tinygemm", "cuBLAS", "bitsandbytes"), ("gemlite",)):  # the last tunes itself
        for shape in shapes:
            measure(*shape, names, rows, until)
            save(rows, out)
            torch.cuda.empty_cache()
    print("| what | M | weight N×K | bfloat16 | ao | others, µs |\n|---|---|---|---|---|---|")
    for row in rows:
        texts = {name: f"{us:.1f}" if isinstance(us, float) else str(us) for name, us in row.items()}
        others = [f"{name} {texts[name]}" for name in list(row)[5:] if name != "ao"]
        cells = (row["what"], row["m"], f"{row['n']}×{row['k']}", texts["bfloat16"], texts.get("ao", ""))
        print("| " + " | ".join(map(str, (*cells, ", ".join(others)))) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
