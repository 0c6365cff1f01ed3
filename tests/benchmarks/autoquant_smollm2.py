"""Autoquant on re-parametrized SmolLM2-135M: estimates against the truth, plans against uniform schemes.

    python tests/benchmarks/autoquant_smollm2.py FILE [--only accuracy|speed]

Needs what ``hatch run demo:data`` installs. ``accuracy``: how each measure of errors agrees with the
divergence of single changed layers on held-out text, and the loss of plans at the bytes of each uniform
scheme. ``speed``: seconds of a cold and a warm search and of the solver, and tokens a second of a plan that
may cost 0.01 nats; to be run alone. What is in FILE already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))

from data import smollm2_gguf, wiki_text
from reparametrize import reparametrize_

import ao_core as ao
from ao_autoquant import Budget, Exploration, explore
from ao_autoquant.check import quantized
from ao_autoquant.exchange import exchanged
from ao_autoquant.pipeline import carry_out
from ao_autoquant.profile import profile
from ao_autoquant.sensitivity import Divergence, bounded
from ao_core import metrics, token_speed
from ao_core.plan import fingerprint

CONTEXT, SEARCHED, DECODED = 512, 4, 32
UNIFORM = (
    "int8-weight-only",
    "int8-dynamic",
    "int4-weight-only:group_size=32",
    "int4-weight-only:group_size=64,zero_point=integer",
    "nf4",
    "nf4:block_size=128",
    "nf4:block_size=256",
    "uint4",
)


class Results:
    """A JSON file that holds what is done, after each step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def get(self, name: str, measure: Any) -> Any:
        """What is known under ``name``, or what ``measure()`` returns."""
        if name not in self.done:
            self.done[name] = measure()
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.done, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.path)
        sys.stdout.write(f"{name} {json.dumps(self.done[name])}\n")
        sys.stdout.flush()
        return self.done[name]


class Subject:
    """Model and text."""

    def __init__(self, options: argparse.Namespace) -> None:
        loaded = ao.load_model(str(smollm2_gguf()), dtype=torch.float32)
        reparametrize_(loaded.model, seed=options.seed)
        self.model = loaded.model.to(options.device).eval()
        self.tokenizer = loaded.tokenizer
        ids = self.tokens("calibration", SEARCHED * CONTEXT)
        self.calibration = list(ids.view(SEARCHED, 1, CONTEXT))
        self.examples, self.counts = [ids[None, :256], ids[None, :1]], [1.0, float(DECODED)]
        self.held = self.tokens("evaluation", options.windows * CONTEXT)
        self.reference: Any = None
        self.every = options.every

    def tokens(self, split: Any, count: int) -> torch.Tensor:
        return torch.tensor(self.tokenizer(wiki_text(split)[: count * 8], verbose=False)["input_ids"][:count])

    def explore(self, error: Any, **options: Any) -> Exploration:
        return explore(
            self.model, self.examples, weights=self.counts, schemes=UNIFORM, error=error,
            calibration=self.calibration, wanted=self._wanted, progress=True, **options,
        )  # fmt: skip

    def _wanted(self, _: Any, name: str) -> bool:
        parts = name.split(".")  # model.layers.3.mlp.up_proj
        return len(parts) < 3 or int(parts[2]) % self.every == 0

    def delta(self, chosen: dict[str, str]) -> dict[str, float]:
        """ΔNLL on the held-out windows."""
        if self.reference is None:
            self.reference = metrics.perplexity(self.model, self.held, context=CONTEXT)
        with torch.no_grad():
            weights = quantized(self.model, chosen)
        with exchanged(weights):
            found = metrics.delta_nll(
                self.reference, metrics.perplexity(self.model, self.held, context=CONTEXT)
            )
        return {"delta_nll": found.mean, "se": found.se}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", choices=["accuracy", "speed"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--layers", type=int, default=20, help="whose divergence is measured")
    parser.add_argument(
        "--every", type=int, default=1, help="search one of so many blocks; others stay float"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results, subject = Results(options.results), Subject(options)
    only = f"--only {options.only} " if options.only else ""
    command = f"python tests/benchmarks/autoquant_smollm2.py FILE {only}--device {options.device}"
    sizes = f"--seed {options.seed} --windows {options.windows} --every {options.every}"
    results.get("command", lambda: f"{command} {sizes}")
    results.get("fingerprint", lambda: fingerprint(options.device))
    if options.only != "speed":
        accuracy(subject, results, options.layers)
    if options.only != "accuracy":
        speed(subject, results)


def accuracy(subject: Subject, results: Results, count: int) -> None:
    """Estimates against the truth; plans against uniform schemes of equal bytes."""
    found: dict[str, Exploration] = {error: subject.explore(error) for error in ("loss", "output")}
    uniform = found["loss"].uniform()
    for scheme in UNIFORM:
        text = str(ao.parse_scheme(scheme))
        size = found["loss"].totals(uniform[text]).bytes

        def row(name: str, chosen: dict[str, str]) -> None:
            predicted = found["loss"].totals(chosen)
            results.get(
                name,
                lambda: {**subject.delta(chosen), "predicted": predicted.error, "bytes": predicted.bytes},
            )

        row(f"uniform {text}", uniform[text])
        for error, each in found.items():
            row(f"plan at the bytes of {text}, by {error}", each.choose("error", Budget(max_bytes=size)))
    results.get("estimates", lambda: estimates(subject, found, count))


def estimates(subject: Subject, found: dict[str, Exploration], count: int) -> dict[str, Any]:
    """Of single changed layers: Spearman's correlation with the divergence on held-out text, and sums."""
    layers = random.Random(0).sample(sorted(found["loss"].options), count)
    seen = profile(subject.model, subject.examples).seen
    on_calibration = Divergence(subject.model, seen, subject.calibration)
    held = [window[None] for window in subject.held[: 2 * CONTEXT].split(CONTEXT)]
    truth = Divergence(subject.model, seen, held)
    truth._reference = [(batch, truth._predicted(batch)) for batch, _ in bounded(subject.model, held, 1024)]
    rows: list[dict[str, float]] = []
    for name in layers:
        for scheme in found["loss"].options[name]:
            if scheme == "float":
                continue
            with torch.no_grad():
                weight = seen[name].layer.quantize(ao.parse_scheme(scheme))
                rows.append(
                    {
                        "output": found["output"].options[name][scheme].error,
                        "loss": found["loss"].options[name][scheme].error,
                        "kl": on_calibration.increase(name, weight),
                        "truth": truth.increase(name, weight),
                        "scheme": scheme,  # type: ignore[dict-item]
                    }
                )
    total = sum(row["truth"] for row in rows)
    return {
        "layers": count,
        "candidates": len(rows),
        "rows": rows,
        **{
            error: {
                "spearman": float(spearmanr([r[error] for r in rows], [r["truth"] for r in rows])[0]),
                "sum_over_truth": sum(row[error] for row in rows) / total,
            }
            for error in ("output", "loss", "kl")
        },
    }


def speed(subject: Subject, results: Results) -> None:
    """Seconds of searches and of the solver; tokens a second of a plan that may cost 0.01 nats."""

    def searched() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["AO_AUTOQUANT_CACHE"] = str(Path(folder) / "measured.sqlite")
            cold, warm = (_seconds(lambda: subject.explore("loss")) for _ in range(2))
            del os.environ["AO_AUTOQUANT_CACHE"]
        return {"cold": cold, "warm": warm}

    results.get("search_seconds", searched)
    found = subject.explore("loss")
    size = found.totals(found.uniform()[str(ao.parse_scheme(UNIFORM[3]))]).bytes
    results.get("solve_seconds", lambda: _seconds(lambda: found.choose("error", Budget(max_bytes=size))))
    results.get("plan of 0.01 nats", lambda: quick(subject, found))


def quick(subject: Subject, found: Exploration) -> dict[str, Any]:
    """Tokens a second of float and of the plan, and what it costs."""
    held = [window[None] for window in subject.held.split(CONTEXT)]
    outcome = carry_out(
        subject.model, found, subject.examples, weights=subject.counts, calibration=subject.calibration,
        budget=Budget(max_error=0.01), check=True, held=held,
    )  # fmt: skip
    schemes = list(outcome.chosen.values())
    before = token_speed.speed(subject.model, subject.held, prefill=256, decode=DECODED)
    with torch.no_grad():
        weights = quantized(subject.model, outcome.chosen)
    with exchanged(weights):
        after = token_speed.speed(subject.model, subject.held, prefill=256, decode=DECODED)
    return {
        "float": vars(before),
        "plan": vars(after),
        "check": outcome.plan.evidence["check"],
        "schemes": {name: schemes.count(name) for name in sorted(set(schemes))},
    }


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
