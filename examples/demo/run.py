"""The demo: a real language model, and for each of its layers the scheme that autoquant chooses.

Loads SmolLM2-135M-Instruct, measures it in float and with a few schemes on all layers, searches the smallest
plan whose measured loss grows by a given amount at most, shows a table, saves the converted model beside the
plan and an HTML report, loads it in a fresh process, compares the perplexity to the last digit, and lets it
write a sentence. With ``--results`` every installed scheme is measured (the ternary example's too).
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from data import smollm2_gguf, wiki_text
from reparametrize import reparametrize_
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from search import SCHEMES, Search, search_

import ao_core as ao
from ao_autoquant import Budget
from ao_autoquant.report import findings, html
from ao_core import metrics, token_speed

console = Console(highlight=False)
TOKENS, CONTEXT = 12_288, 512
QUICK = 4_096  # of these, without --results
PROMPT = "The most important thing about the ocean is"


@dataclass
class Result:
    """One row of the table."""

    name: str
    report: ao.Report | None
    score: metrics.Perplexity
    speed: token_speed.Speed
    bytes: int
    delta: metrics.Delta | None = None


def main(
    out: Annotated[Path, typer.Option(help="Where to save the model, its plan and report.")] = Path(
        "smollm2-ao"
    ),
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    max_error: Annotated[float, typer.Option(help="Nats a token that the plan may lose.")] = 0.05,
    results: Annotated[
        Path | None, typer.Option(help="Measure every installed scheme, and write the numbers here, as JSON.")
    ] = None,
) -> None:
    """Search the best plan for SmolLM2, beside a few uniform schemes, and show what each costs."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    start = time.perf_counter()
    with _progress() as bar:
        step = bar.add_task("loading SmolLM2-135M", total=None)
        loaded = ao.load_model(str(smollm2_gguf()), dtype=getattr(torch, dtype))
        reparametrize_(loaded.model)
        model = loaded.model
        text = wiki_text("evaluation")
        count = TOKENS if results else QUICK
        tokens = torch.tensor(loaded.tokenizer(text[: count * 8], verbose=False)["input_ids"][:count])
        names = list(ao.schemes()) if results else list(SCHEMES)
        bar.update(step, total=(1 + len(names)) * (count // CONTEXT), completed=0)
        rows = [_measure("float", model, None, tokens, bar, step)]
        refused: dict[str, str] = {}
        for name in names:
            quantized = copy.deepcopy(model)
            try:
                report = ao.quantize_(quantized, name)
            except ao.RejectedError as error:  # such as 2:4, which asks for pruned weights
                refused[name] = str(error)
                bar.advance(step, count // CONTEXT)
                continue
            rows.append(_measure(name, quantized, report, tokens, bar, step))
            rows[-1].delta = metrics.delta_nll(rows[0].score, rows[-1].score)
            del quantized
    searched = time.perf_counter()
    search = search_(model, loaded.tokenizer, max_error)
    searched = time.perf_counter() - searched
    with _progress() as bar:
        plan = _measure("the plan", model, None, tokens, bar, bar.add_task("", total=count // CONTEXT))
    plan.delta = metrics.delta_nll(rows[0].score, plan.score)
    _show([*rows, plan], dtype)
    for name, why in refused.items():
        console.print(f"left out: {name}: {why}", markup=False)
    _show_plan(search, max_error, searched)
    if set(search.chosen.values()) == {"float"}:
        console.print(f"No plan loses {max_error} nats a token or less: the float model stays best.")
        return
    _save(out, loaded, search, max_error)
    _check(out, tokens, plan)
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    if results:
        data = {**_data(rows, dtype), "plan": _plan_data(plan, search, max_error)}
        results.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _show_plan(search: Search, max_error: float, seconds: float) -> None:
    """What the plan uses, what was predicted, what the check measured."""
    used = Counter(search.chosen.values())
    console.print(f"The plan: {', '.join(f'{name} on {count}' for name, count in used.most_common())}")
    for line in findings(search.plan):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print(
        f"  smallest that loses at most {max_error} nats a token; {search.found.measured} numbers measured, "
        f"{seconds:.0f} s of search and check",
        soft_wrap=True,
    )


def _save(out: Path, loaded: Any, search: Search, max_error: float) -> None:
    ao.save(loaded.model, out, plan=search.plan, tokenizer=loaded.tokenizer)
    search.plan.save(out / "plan.json")
    page = html(
        search.found, search.chosen, title="SmolLM2-135M-Instruct", objective="bytes",
        budget=Budget(max_error=max_error), plan=search.plan,
    )  # fmt: skip
    (out / "report.html").write_text(page, encoding="utf-8")
    console.print(f"Saved in {out}: the model, plan.json, report.html")


def _measure(
    name: str, model: Any, report: ao.Report | None, tokens: torch.Tensor, bar: Progress, step: Any
) -> Result:
    bar.update(step, description=name)
    if not sys.stderr.isatty():  # where no bar shows
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
    done = bar.tasks[step].completed
    score = metrics.perplexity(
        model,
        tokens,
        context=CONTEXT,
        progress=lambda now, total: bar.update(step, completed=done + now),
    )
    speed = token_speed.speed(model, tokens)
    return Result(name, report, score, speed, metrics.model_bytes(model).total)


def _show(rows: list[Result], dtype: str) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for column in ("scheme", "MB", "perplexity", "ΔNLL ± SE", "decode", "prefill"):
        name = column == "scheme"  # folds where the terminal is narrow; numbers are never cut
        table.add_column(column, justify="left" if name else "right", no_wrap=not name, overflow="fold")
    for row in rows:
        delta = "" if row.delta is None else f"{row.delta.mean:+.4f} ± {row.delta.se:.4f}"
        decode = "-" if row.speed.decode_tokens_per_s is None else f"{row.speed.decode_tokens_per_s:.1f}"
        table.add_row(
            row.name, f"{row.bytes / 1e6:.1f}", _short(row.score.perplexity), delta, decode,
            f"{row.speed.prefill_tokens_per_s:.0f}",
        )  # fmt: skip
    console.print(table)
    layers = max(len(row.report.converted) for row in rows if row.report)
    console.print(
        f"SmolLM2-135M-Instruct, {layers} linears, {dtype}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; {rows[0].score.tokens_scored} tokens of Wikipedia; "
        "decode and prefill in tokens/s"
    )
    skipped = {n: why for row in rows if row.report for n, why in row.report.skipped.items()}
    for name, why in skipped.items():
        console.print(f"left alone: {name}: {why}", markup=False)


def _short(perplexity: float) -> str:
    return f"{perplexity:.3f}" if perplexity < 1e5 else f"{perplexity:.2e}"


def _check(out: Path, tokens: torch.Tensor, row: Result) -> None:
    """Load ``out`` in a fresh process, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.json"
        file.write_text(json.dumps(tokens.tolist()))
        command = [sys.executable, __file__, "--fresh", str(out), str(file)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
    fresh = json.loads(answer.stdout.splitlines()[-1])
    same = fresh["perplexity"] == row.score.perplexity
    verdict = "the same to the last digit" if same else "NOT the same"
    console.print(f"Fresh process: perplexity {fresh['perplexity']!r}, {verdict}")
    console.print(f"It writes: {fresh['sentence']}", markup=False)
    if not same:
        sys.exit(1)


def _fresh(directory: str, tokens_file: str) -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    loaded = ao.load_model(directory)
    tokens = torch.tensor(json.loads(Path(tokens_file).read_text()))
    score = metrics.perplexity(loaded.model, tokens, context=CONTEXT)
    prompt = loaded.tokenizer(PROMPT, return_tensors="pt")
    written = loaded.model.generate(**prompt, max_new_tokens=24, do_sample=False)
    sentence = loaded.tokenizer.decode(written[0], skip_special_tokens=True)
    print(json.dumps({"perplexity": score.perplexity, "sentence": sentence}))


def _data(rows: list[Result], dtype: str) -> dict[str, Any]:
    from ao_core.plan import fingerprint

    return {
        "command": "hatch run demo:run --results FILE",
        "fingerprint": fingerprint(),
        "dtype": dtype,
        "tokens": rows[0].score.tokens_scored,
        "rows": [
            {
                "scheme": row.name,
                "bytes": row.bytes,
                "linear_bytes_before": row.report.converted_bytes_before if row.report else None,
                "linear_bytes_after": row.report.converted_bytes_after if row.report else None,
                "layers_converted": len(row.report.converted) if row.report else 0,
                "perplexity": row.score.perplexity,
                "delta_nll": row.delta.mean if row.delta else None,
                "delta_nll_se": row.delta.se if row.delta else None,
                "decode_tokens_per_s": row.speed.decode_tokens_per_s,
                "prefill_tokens_per_s": row.speed.prefill_tokens_per_s,
            }
            for row in rows
        ],
    }


def _plan_data(plan: Result, search: Search, max_error: float) -> dict[str, Any]:
    return {
        "max_error": max_error,
        "schemes": dict(Counter(search.chosen.values())),
        "check": search.plan.evidence["check"],
        "bytes": plan.bytes,
        "perplexity": plan.score.perplexity,
        "delta_nll": plan.delta.mean if plan.delta else None,
        "delta_nll_se": plan.delta.se if plan.delta else None,
        "decode_tokens_per_s": plan.speed.decode_tokens_per_s,
        "prefill_tokens_per_s": plan.speed.prefill_tokens_per_s,
    }


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fresh"]:
        _fresh(*sys.argv[2:])
    else:
        typer.run(main)
