"""GPTQ on re-parametrized SmolLM2-135M: loss, layers' errors on held-back text, time and memory, as JSON.

    python tests/benchmarks/gptq_smollm2.py results.json --seed 0

Needs what ``hatch run demo:data`` installs. Results of other seeds or options are added to the file.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ao_core as ao
from ao_core import metrics
from ao_core.calibrate import Hessian
from ao_core.calibrate.observer import Observer
from ao_core.numerics.hessian import output_error
from ao_core.plan import fingerprint

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))

from data import smollm2_gguf, wiki_text
from reparametrize import reparametrize_

TOKENS, CONTEXT, HELD_BACK = 12_288, 512, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--algorithm", default="gptq")
    parser.add_argument("--scheme", default="int4-weight-only:group_size=64,zero_point=integer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = json.loads(options.results.read_text("utf-8")) if options.results.is_file() else {}
    name = f"{options.algorithm} > {options.scheme}, {options.samples} x {CONTEXT}, seed {options.seed}"
    done[name] = measure(options)
    temporary = options.results.with_suffix(".tmp")
    temporary.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.results)
    print(name, json.dumps(done[name], indent=1))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compress once, and compare with the float model and with rounding."""
    loaded = ao.load_model(str(smollm2_gguf()), dtype=torch.float32)
    reparametrize_(loaded.model, seed=options.seed)
    model = loaded.model.to(options.device)
    text = wiki_text("calibration")[: (options.samples + HELD_BACK) * CONTEXT * 8]
    ids = torch.tensor(loaded.tokenizer(text, verbose=False)["input_ids"])
    ids = ids[: (options.samples + HELD_BACK) * CONTEXT].view(-1, CONTEXT).to(options.device)
    tokens = wiki_text("evaluation")[: TOKENS * 8]
    tokens = torch.tensor(loaded.tokenizer(tokens, verbose=False)["input_ids"][:TOKENS])
    reference = metrics.perplexity(model, tokens, context=CONTEXT)
    floats = {name: module.weight.detach() for name, module in model.named_modules() if _is_linear(module)}
    rounded = copy.deepcopy(model)
    rounded_names = set(ao.quantize_(rounded, options.scheme).converted)
    rounding = metrics.delta_nll(reference, metrics.perplexity(rounded, tokens, context=CONTEXT))
    del rounded
    unseen = _hessians(model, floats, ids[options.samples :])

    batches = list(ids[: options.samples].view(-1, min(8, options.samples), CONTEXT))
    memory = _memory()
    wall, cpu = time.perf_counter(), time.process_time()
    report = ao.compress_(model, options.algorithm, batches, scheme=options.scheme)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    above = _memory() - memory
    if set(report.converted) != rounded_names:
        raise RuntimeError("rounding and the algorithm converted different layers")
    delta = metrics.delta_nll(reference, metrics.perplexity(model, tokens, context=CONTEXT))
    ratios = {name: _ratio(model, name, floats[name], unseen[name]) for name in report.converted}
    kinds = sorted({name.rpartition(".")[2] for name in ratios})
    return {
        "command": f"python tests/benchmarks/gptq_smollm2.py FILE --seed {options.seed} "
        f"--device {options.device} --samples {options.samples} "
        f"--algorithm {options.algorithm} --scheme {options.scheme}",
        "fingerprint": fingerprint(options.device),
        "delta_nll": delta.mean,
        "delta_nll_se": delta.se,
        "delta_nll_rounded": rounding.mean,
        "delta_nll_rounded_se": rounding.se,
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_bytes_above_the_model": above,
        "held_back_error_over_rounding": statistics.mean(ratios.values()),
        "held_back_error_over_rounding_rms": statistics.mean(ratio**0.5 for ratio in ratios.values()),
        "by_kind_rms": {
            kind: statistics.mean(ratio**0.5 for name, ratio in ratios.items() if name.endswith(kind))
            for kind in kinds
        },
        "rounding_kept": sum(facts.get("gptq") != "done" for facts in report.notes.values()),
        "largest_percdamp": max(facts.get("percdamp", 0.0) for facts in report.notes.values()),
    }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features < 10_000


@torch.no_grad()
def _hessians(model: Any, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the float model's inputs on held-back text."""
    found = {name: Hessian(weight.shape[1], weight.device) for name, weight in weights.items()}
    held = {name: model.get_submodule(name).weight for name in weights}
    for row in ids.split(4):
        with Observer(held, lambda name, _, x, out: found[name].update(x)):
            model(row, use_cache=False)
    return {name: each.value for name, each in found.items()}


def _ratio(model: Any, name: str, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Squared output error over that of rounding to the nearest."""
    stored = model.get_submodule(name).weight
    rounded = ao.parse_scheme(stored.scheme).quantize(weight).dequantize()
    return output_error(weight, stored.dequantize(), hessian) / output_error(weight, rounded, hessian)


def _memory() -> int:
    """Peak bytes of the process so far; of the GPU, where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
