"""2:4 linears beside dense ones on a CUDA device, and Wanda on a model of Llama-3-8B's shape; run by hand.

    python tests/benchmarks/sparse_linears.py linears docs/results/h100-sparse.json
    python tests/benchmarks/sparse_linears.py wanda docs/results/h100-wanda.json [BLOCKS] [ALGORITHM]

``linears``: every result is checked against float64 first. A timing is the median replay of a CUDA graph that
walks a ring of weight copies larger than the L2 cache, divided by the ring's length.

``wanda``: random weights on the host, a block at a time on the device, 128 windows of 2048 tokens. Seconds
are those of the whole call and of its parts, GB the peak on the device.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import ao_core as ao
from ao_core.plan import fingerprint
from ao_sparsity.linear import int8_codes
from ao_sparsity.masks import least_of_groups
from ao_sparsity.semi_structured import SemiSparseInt8Tensor, SemiSparseTensor
from ao_sparsity.sparse_cores import LAYOUTS, rejects_layout

SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))  # (N, K) of Llama-3-8B
ROWS = (16, 128, 1024, 4096)
RING_BYTES = 300_000_000
Call = Callable[[], torch.Tensor]


def linears(out: str) -> None:
    """Check and time 2:4 linears, print a Markdown table, write ``out``."""
    rows: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    for n, k in SHAPES:
        rings = _rings(n, k, problems)
        dense = rings.pop("values")
        for m in ROWS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            row: dict[str, Any] = {"m": m, "n": n, "k": k}
            for name, ring in rings.items():
                calls = [_call(name, weight, x) for weight in ring]
                if reason := _wrong(name, calls[0], x, dense[0]):
                    problems[f"{name}, {m} rows, {n}×{k}"] = reason
                    continue
                try:
                    row[name] = ao.microseconds(calls, "cuda", replays=20)
                except RuntimeError as error:  # a library that can't be captured
                    problems[f"{name}, {m} rows, {n}×{k}"] = str(error).splitlines()[0]
            rows.append(row)
            print(row, flush=True)
        del rings, dense
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("m", "n", "k")))
    print("\n| M | weight N×K | " + " | ".join(f"{name}, µs" for name in names) + " |")
    print("|---" * (2 + len(names)) + "|")
    for row in rows:
        cells = " | ".join(f"{row[name]:.1f}" if name in row else "" for name in names)
        print(f"| {row['m']} | {row['n']}×{row['k']} | {cells} |")
    for what, reason in problems.items():
        print(f"left out: {what}: {reason}")
    _write(out, "linears", {"rows": rows, "left_out": problems})


def _rings(n: int, k: int, problems: dict[str, str]) -> dict[str, list[Any]]:
    """Copies of the same random 2:4 weights for each way to multiply by them."""
    copies = max(2, RING_BYTES // (2 * n * k))
    values = []
    for _ in range(copies):
        weight = torch.randn(n, k, device="cuda") / k**0.5
        values.append(weight.masked_fill(least_of_groups(weight.abs(), 2, 4), 0).bfloat16())
    codes = [int8_codes(w) for w in values]
    rings: dict[str, list[Any]] = {"values": values, "dense bf16": values}
    rings["dense int8, product alone"] = [each for each, _ in codes]
    rings["dense int8-dynamic"] = [ao.parse_scheme("int8-dynamic").quantize(w) for w in values]
    for layout in LAYOUTS:
        for name, dtype, kind in (
            ("2:4 bf16", torch.bfloat16, SemiSparseTensor),
            ("2:4 int8-dynamic", torch.int8, SemiSparseInt8Tensor),
        ):
            if reason := rejects_layout(layout, (n, k), dtype, values[0].device):
                problems[f"{name} {layout}, {n}×{k}"] = reason
                continue
            rings[f"{name} {layout}"] = [
                _packed(w, c, kind, layout) for w, c in zip(values, codes, strict=True)
            ]
    warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype.*")
    try:
        rings["torch 2:4 bf16"] = [torch.sparse.to_sparse_semi_structured(w) for w in values]
    except (RuntimeError, ValueError) as error:
        problems[f"torch 2:4 bf16, {n}×{k}"] = str(error).splitlines()[0]
    return rings


def _packed(weight: torch.Tensor, codes: tuple[torch.Tensor, torch.Tensor], kind: Any, layout: str) -> Any:
    from ao_sparsity.packed24 import compress
    from ao_sparsity.semi_structured import PackedSparseTensor

    parts = compress(weight) if kind is SemiSparseTensor else (*compress(codes[0]), codes[1])
    plain = kind(*parts, shape=weight.shape, dtype=weight.dtype, scheme="")
    return PackedSparseTensor.from_plain(plain, layout)


def _call(name: str, weight: Any, x: torch.Tensor) -> Call:
    if name == "dense int8, product alone":
        from ao_core.numerics import affine

        x_codes = affine.quantize_per_token(F.pad(x, (0, 0, 0, max(17 - len(x), 0))))[0]
        return lambda: torch._int_mm(x_codes, weight.t())
    return lambda: F.linear(x, weight)


def _wrong(name: str, call: Call, x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why a result is not that of float64 arithmetic, or None."""
    try:
        found = call()[: len(x)]
    except (RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if name == "dense int8, product alone":  # scales are not applied
        return None if found.dtype == torch.int32 else f"it gives {found.dtype}"
    sqnr = ao.sqnr(x.double() @ weight.double().t(), found)
    return None if sqnr > (36 if "int8" in name else 42) else f"{sqnr:.1f} dB"


class Phases:
    """Seconds by phase; the device is waited for at both ends of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what runs inside as ``name``."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            torch.cuda.synchronize()
            self.seconds[name] += time.perf_counter() - start


def wanda(out: str, blocks: str = "32", algorithm: str = "wanda:pattern=2:4") -> None:
    """Prune a random model of Llama-3-8B's shape that lies on the host; print and write ``out``."""
    from ao_core.calibrate.stage import Stage
    from ao_core.calibrate.walker import Walker
    from ao_sparsity.algorithm import Pruning

    phases = Phases()
    with phases.of("making the model and the tokens"):
        model = _llama(int(blocks))
        batches = list(torch.randint(0, 1000, (128, 2048)).view(-1, 2, 2048))

    def timed(owner: type, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            with phases.of(phase):
                return original(*args, **kwargs)

        setattr(owner, name, run)

    timed(Stage, "collect", "statistics: each block on all windows, and its groups")
    timed(Walker, "_visit", "blocks in all: statistics, masks")
    timed(Pruning, "_one", "masks")
    torch.cuda.reset_peak_memory_stats()
    with phases.of("the whole call"):
        report = ao.compress_(model, algorithm, batches, device="cuda", progress=True)
    peak = torch.cuda.max_memory_allocated() / 1e9
    for name, seconds in phases.seconds.items():
        print(f"{seconds:8.1f} s  {name}")
    shares = [facts["sparsity"] for facts in report.notes.values() if "sparsity" in facts]
    print(f"{peak:8.1f} GB peak; {len(shares)} layers, zeros {min(shares):.3f} to {max(shares):.3f}")
    print(f"calibrated {report.walk}")
    rows = {"seconds": dict(phases.seconds), "peak_gb": peak, "layers": len(shares), "blocks": int(blocks)}
    _write(out, f"wanda {algorithm}", rows)


def _llama(blocks: int) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=1000, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Made on the device: a host takes minutes for eight billion normal values.
            made = torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16) * 0.02
            parameter.copy_(torch.ones_like(made) if "norm" in name else made)
    rotary = type(model.model.rotary_emb)(config=config)  # its buffers were empty too
    model.model.rotary_emb = rotary
    return model


def _write(out: str, what: str, data: dict[str, Any]) -> None:
    command = f"python tests/benchmarks/sparse_linears.py {what.split(maxsplit=1)[0]} FILE"
    file = Path(out)
    temporary = file.with_suffix(".tmp")
    whole = {"command": command, "what": what, "fingerprint": fingerprint("cuda"), **data}
    whole["cusparselt"] = torch.backends.cusparselt.version()
    temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    {"linears": linears, "wanda": wanda}[sys.argv[1]](*sys.argv[2:])
