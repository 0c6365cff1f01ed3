"""What pruning costs in perplexity on SmolLM2-135M: the table of docs/benchmarks.md; run by hand.

    python tests/benchmarks/sparsity_accuracy.py FILE [NAME ...] [--device cuda]

A name is ``ALGORITHM[ + ALGORITHM][ > SCHEME]``. What is in FILE already is not measured again. The model and
the text are those of the demo, calibrated on 128 windows of 512 tokens and scored on 24, in float32; the
model as it is shipped.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))

from data import smollm2_gguf, wiki_text

import ao_core as ao
from ao_core import metrics
from ao_core.plan import fingerprint

TOKENS, CONTEXT, SAMPLES = 12_288, 512, 128
NAMES = (
    "magnitude",
    "magnitude:pattern=2:4",
    "wanda",
    "wanda:pattern=2:4",
    "sparsegpt",
    "sparsegpt:pattern=2:4",
    "sparsegpt:sequential=False",
    "sparsegpt:sequential=False,pattern=2:4",
    "wanda:sequential=False",
    "wanda:sequential=False,pattern=2:4",
    "wanda:sequential=False,pattern=4:8",
    "wanda:sequential=False,per=layer",
    "wanda:sequential=False,per=layer,squared=True",
    "wanda:pattern=2:4 > semi-sparse",
    "wanda:pattern=2:4 > semi-sparse-int8-dynamic",
    "sparsegpt:pattern=2:4 > semi-sparse-int8-dynamic",
    "wanda:pattern=2:4 + gptq > int4-weight-only:group_size=64",
    "sparsegpt:pattern=2:4 + gptq > int4-weight-only:group_size=64",
)


def main() -> None:
    """Measure, print a Markdown table, write the file after each line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_intermixed_args()  # names may follow --device
    file, device = given.file, given.device
    done: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {"rows": {}}
    done |= {
        "command": "python tests/benchmarks/sparsity_accuracy.py FILE",
        "fingerprint": fingerprint(device),
    }
    loaded = ao.load_model(str(smollm2_gguf()), dtype=torch.float32)
    loaded.model.to(device)
    tokens = _tokens(loaded.tokenizer, "evaluation", TOKENS)
    ids = _tokens(loaded.tokenizer, "calibration", SAMPLES * CONTEXT).view(-1, 8, CONTEXT)
    batches = list(ids.to(device))
    reference = metrics.perplexity(loaded.model, tokens, context=CONTEXT)
    done["rows"]["float"] = {"perplexity": reference.perplexity}
    for name in given.names:
        if name in done["rows"]:
            continue
        model = copy.deepcopy(loaded.model)
        start = time.perf_counter()
        row = _compress(model, name, batches)
        row["seconds"] = time.perf_counter() - start
        score = metrics.perplexity(model, tokens, context=CONTEXT)
        delta = metrics.delta_nll(reference, score)
        row |= {"perplexity": score.perplexity, "delta_nll": delta.mean, "delta_nll_se": delta.se}
        row |= {"sparsity": metrics.sparsity(model), "bytes": metrics.model_bytes(model).linear_weights}
        done["rows"][name] = row
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)
    _show(done["rows"])


def _tokens(tokenizer: Any, split: Any, count: int) -> torch.Tensor:
    return torch.tensor(tokenizer(wiki_text(split)[: count * 8], verbose=False)["input_ids"][:count])


def _compress(model: nn.Module, name: str, batches: list[torch.Tensor]) -> dict[str, Any]:
    algorithms, _, scheme = name.partition(" > ")
    listed = algorithms.split(" + ")
    blind = all(each.startswith("magnitude") for each in listed)
    report = ao.compress_(model, listed, [batches[0][:1, :8]] if blind else batches, scheme=scheme or None)
    return {"layers": len(report.notes)}


def _show(rows: dict[str, dict[str, Any]]) -> None:
    print("| algorithm, scheme | zeros | linear weights, MB | perplexity | ΔNLL ± SE |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        if name == "float":
            print(f"| float |  |  | {row['perplexity']:.3f} |  |")
            continue
        delta = f"{row['delta_nll']:+.4f} ± {row['delta_nll_se']:.4f}"
        size = row["bytes"] / 1e6
        print(f"| `{name}` | {row['sparsity']:.3f} | {size:.1f} | {row['perplexity']:.2f} | {delta} |")


if __name__ == "__main__":
    main()
