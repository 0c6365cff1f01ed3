"""Autoquant on a Llama-3-8B-shaped model with random weights: seconds of a search, and what its plans gain.

    python tests/benchmarks/autoquant_llama.py docs/results/h200-autoquant.json [--layers 32]

Searches for decoding one token, for a prompt of 2048, and for a prompt with 128 tokens after it: from an
empty cache, then again. Then every uniform scheme, and every plan, on a copy of the model: the step of one
token and the prompt are captured as CUDA graphs, and replayed in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from llama import LAYERS, random_model
from torch import nn

import ao_core as ao
from ao_autoquant import explore
from ao_core.plan import fingerprint

SCHEMES = (
    "int4-weight-only:group_size=128",
    "uint4",
    "nf4",
    "int8-weight-only",
    "float8-weight-only",
    "int8-dynamic",
)
MIXES = {"decode": (0.0, 1.0), "prefill": (1.0, 0.0), "mix": (1.0, 128.0)}  # prompts, tokens after them
PROMPT, ROUNDS = 2048, 30


def inputs(device: str, prompt: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A prompt and a token after it: ids and positions."""
    ids = torch.arange(prompt, device=device) * 7 % 1000
    token, at = torch.tensor([5], device=device), torch.tensor([prompt], device=device)
    return {"prefill": (ids, torch.arange(prompt, device=device)), "decode": (token, at)}


class Run:
    """A model and inputs, captured as a CUDA graph where there is a GPU."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self._model, self._given, self._graph = model, given, None
        if given[0].device.type == "cpu":
            model(*given)
            return
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                model(*given)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            model(*given)

    @torch.no_grad()
    def seconds(self) -> float:
        """Of one run."""
        if self._graph is None:
            start = time.perf_counter()
            self._model(*self._given)
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def in_turns(runs: dict[Any, Run], rounds: int) -> dict[Any, float]:
    """The median of ``rounds`` runs of each, in turns: what slows the device down slows all of them down."""
    taken = [{name: run.seconds() for name, run in runs.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(each[name] for each in taken) for name in runs}


def searched(model: nn.Module, examples: Any, weights: list[float], options: argparse.Namespace) -> Any:
    """What was measured, the plan, and the seconds that took."""
    start = time.perf_counter()
    found = explore(model, examples, weights=weights, schemes=options.schemes or None)
    explored = time.perf_counter()
    plan = found.plan()
    facts = {
        "explored_s": round(explored - start, 2),
        "solved_s": round(time.perf_counter() - explored, 2),
        "measured": found.measured,
        "reused": found.reused,
        "faults": [str(each) for each in found.faults],
    }
    print(json.dumps(facts), flush=True)
    return found, plan, facts


def first_block(options: Any) -> dict[str, dict[str, list[float]]]:
    """Layer → candidate → microseconds and their spread, of the first block and what lies outside blocks."""
    wanted = {name: each for name, each in options.items() if not name.startswith("blocks.") or ".0." in name}
    return {
        name: {text: [round(option.us, 2), round(option.spread, 2)] for text, option in each.items()}
        for name, each in wanted.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--schemes", nargs="*", help="candidates; by default all that are installed")
    parser.add_argument("--no-uniform", action="store_true", help="time the plans alone")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {
        "layers": options.layers, "hidden": options.hidden, "heads": max(options.hidden // 128, 1),
        "kv_heads": max(options.hidden // 512, 1), "middle": options.hidden * 7 // 2,
        "context": options.prompt + 128, "vocabulary": options.hidden * 31,
    }  # fmt: skip
    os.environ["AO_AUTOQUANT_CACHE"] = str(Path(tempfile.mkdtemp()) / "cache.sqlite")
    given = inputs(device, options.prompt)
    model = random_model(device, **sizes)
    data: dict[str, Any] = {
        "command": "python tests/benchmarks/autoquant_llama.py FILE",
        "fingerprint": fingerprint(device),
        **sizes,
        "searches": {},
        "rows": [],
    }
    plans: dict[str, ao.Plan] = {}
    for name, counts in MIXES.items():
        used = [(given[part], count) for part, count in zip(given, counts, strict=True) if count]
        examples, weights = [each for each, _ in used], [count for _, count in used]
        found, plan, facts = searched(model, examples, weights, options)
        warm = searched(model, examples, weights, options)[2]
        plans[name] = plan
        chosen: dict[str, int] = {}
        for choice in plan.layers.values():
            chosen[choice.scheme or "float"] = chosen.get(choice.scheme or "float", 0) + 1
        rejected = next(iter(found.rejected.values()), {})
        choices = {**found.uniform(), "plan": found.choose()}
        data["searches"][name] = {
            "cold": facts, "warm": warm, "chosen": chosen, "rejected": rejected,
            "predicted_ms": {each: round(found.totals(of).us / 1e3, 3) for each, of in choices.items()},
            "first_block_us": first_block(found.options),
        }  # fmt: skip
        print(name, json.dumps(data["searches"][name]), flush=True)
    del model, found
    variants: dict[str, Any] = {"bfloat16": None}
    if not options.no_uniform:
        variants |= {name: name for name in SCHEMES}
    variants |= {f"plan for {name}": plan for name, plan in plans.items()}
    runs, stored = {}, {}
    for name, what in variants.items():  # all of them are held: 80 GB
        model = random_model(device, **sizes)
        if isinstance(what, str):
            ao.quantize_(model, what)
        elif what is not None and any(choice.scheme for choice in what.layers.values()):
            ao.apply_(model, what)
        stored[name] = sum(ao.stored_bytes(each) for each in model.parameters())
        runs |= {(name, part): Run(model, given[part]) for part in given}
    took = in_turns(runs, ROUNDS)
    for name in variants:
        row = {"what": name, **{f"{part}_ms": round(1e3 * took[name, part], 3) for part in given}}
        row["mix_ms"] = round(row["prefill_ms"] + 128 * row["decode_ms"], 1)
        row["stored_bytes"] = stored[name]
        data["rows"].append(row)
        print(json.dumps(row), flush=True)
    temporary = options.file.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.file)


if __name__ == "__main__":
    sys.exit(main())
