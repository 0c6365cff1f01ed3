"""``ao autoquant`` and ``ao plan``."""

from __future__ import annotations

import json as writer
from pathlib import Path
from typing import Annotated, Any

import typer

from ao_core.arguments import Device, Dtype, parse_device, parse_dtype

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub id or a GGUF file.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to save.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A JSON file that ao wrote.")]

plan = typer.Typer(help="Plans: show one, compare two, apply one.", no_args_is_help=True)


def autoquant(
    model: Model,
    out: Out,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text that the model reads; else random tokens.")
    ] = None,
    prefill: Annotated[int, typer.Option(min=0, metavar="TOKENS", help="Tokens of a prompt; 0: none.")] = 256,
    decode: Annotated[
        int, typer.Option(min=0, metavar="TOKENS", help="Tokens written after it, one at a time.")
    ] = 32,
    objective: Annotated[str, typer.Option(help="What to make small: latency, bytes or error.")] = "latency",
    error_measure: Annotated[
        str,
        typer.Option(
            help="output: relative errors of layers; loss: nats that they cost, estimated from gradients; "
            "kl: measured, a run of the model for each layer and scheme."
        ),
    ] = "output",
    max_error: Annotated[
        float | None,
        typer.Option(help="Root mean square of the layers' relative errors; nats a token for loss and kl."),
    ] = None,
    max_bytes: Annotated[float | None, typer.Option(help="Of the whole model.")] = None,
    max_latency: Annotated[float | None, typer.Option(help="Microseconds of the layers.")] = None,
    min_speedup: Annotated[float | None, typer.Option(help="Of the layers against float.")] = None,
    scheme: Annotated[list[str] | None, typer.Option(metavar="S", help="Only these schemes.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Measure the plan on the model; choose again if it costs more.")
    ] = False,
    refine: Annotated[
        list[str] | None, typer.Option(metavar="A", help="Carry it out by algorithms, such as gptq.")
    ] = None,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows of the prompt's length for --refine, and as many to --check.")
    ] = 16,
    earlier: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="A plan.json or exploration.json, perhaps of elsewhere."),
    ] = None,
    isolate: Annotated[bool, typer.Option(help="Measure every scheme in a child process.")] = False,
    remeasure: Annotated[bool, typer.Option(help="Measure also what was measured before.")] = False,
    dtype: Dtype = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Measure every installed scheme on every layer of MODEL, choose, and save the result."""
    import torch

    from ao_autoquant import known, report
    from ao_autoquant.exploration import explore
    from ao_autoquant.pipeline import carry_out
    from ao_autoquant.refine import algorithms_of
    from ao_autoquant.search import Budget, checked_objective
    from ao_autoquant.sensitivity import checked_measure
    from ao_autoquant.texts import given_text
    from ao_core import CheckpointError, check_target, load_model, parse_scheme, save
    from ao_core.calibrate import read_texts

    for each in scheme or ():
        parse_scheme(each)  # a misspelt one ends here, before the model is loaded
    algorithms_of(refine or [])
    wanted, measure = checked_objective(objective), checked_measure(error_measure)
    budget = Budget(max_error, max_bytes, max_latency, min_speedup)
    before = None if earlier is None else known.load(earlier)
    check_target(out)
    words = None if text is None else "\n\n".join(read_texts(text))
    _say(f"loading {model}")
    loaded = load_model(model, dtype=parse_dtype(dtype), device=parse_device(device))
    given = given_text(
        loaded, words, prefill, decode, windows, more=check or bool(refine) or measure != "output"
    )
    if text is None:
        _say("warning: no --text: all is measured on random tokens, whose activations are not a text's.")
    found = explore(
        loaded.model, given.examples, weights=given.weights, schemes=scheme or None, error=measure,
        known=before, calibration=given.calibration, isolate=True if isolate else "auto",
        remeasure=remeasure, progress=True,
    )  # fmt: skip
    done = carry_out(
        loaded.model, found, given.examples, weights=given.weights, calibration=given.calibration,
        objective=wanted, budget=budget, check=check, held=given.held, refine=refine or None, apply=True,
        progress=True,
    )  # fmt: skip
    with torch.no_grad():
        save(loaded.model, out, plan=done.plan, tokenizer=loaded.tokenizer)
    page = report.html(
        found, done.chosen, title=f"ao autoquant {model}", objective=wanted, budget=budget, plan=done.plan
    )
    try:
        done.plan.save(out / "plan.json")
        found.save(out / "exploration.json")
        report.write(out / "report.html", page)
    except OSError as error:
        raise CheckpointError(
            f"{out} holds the model, but plan.json, exploration.json and report.html can't all be written: "
            f"{error.strerror}. Free some space and run this again: what was measured is kept."
        ) from error
    if json:
        _print(report.summary(found, done.chosen, done.plan))
        return
    report.show(found, done.chosen, done.plan)
    _say(f"saved in {out}: the model, plan.json, exploration.json, report.html")


@plan.command("show")
def show(path: PlanFile, json: Json = False) -> None:
    """What a plan gives each layer, and why."""
    from ao_core import Plan

    found = Plan.load(path)
    if json:
        typer.echo(found.to_json(), nl=False)
        return
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name, each in found.layers.items():
        given = each.scheme or f"float: {each.reason or 'no reason is kept'}"
        groups.setdefault(given, []).append((name, *_numbers(each.evidence)))
    for given, rows in groups.items():
        typer.echo(f"\n{given}")
        _table((f"{len(rows)} layer{'s' * (len(rows) > 1)}", "µs", "float µs", "error"), rows)
    _say(", ".join(f"{key} {value}" for key, value in found.fingerprint.items() if value))


@plan.command("diff")
def diff(
    first: Annotated[Path, typer.Argument(metavar="A")],
    second: Annotated[Path, typer.Argument(metavar="B")],
    json: Json = False,
) -> None:
    """Layers for which two plans differ, and how their devices do."""
    from ao_autoquant.plans import differences
    from ao_core import Plan

    found = differences(Plan.load(first), Plan.load(second))
    if json:
        _print(found)
        return
    rows = [(name, *pair) for name, pair in {**found["layers"], **found["fingerprint"]}.items()]
    if rows:
        _table(("", str(first), str(second)), rows)
    else:
        typer.echo("the plans are the same")


@plan.command("apply")
def apply(
    path: PlanFile, model: Model, out: Out, dtype: Dtype = None, device: Device = "cpu", json: Json = False
) -> None:
    """Convert MODEL along a plan and save it; says so where the plan was measured on another device."""
    from ao_core import Plan, apply_, check_target, load_model, save

    found = Plan.load(path)
    check_target(out)
    where = parse_device(device)
    loaded = load_model(model, dtype=parse_dtype(dtype), device=where)
    report = apply_(loaded.model, found, progress=True)
    save(loaded.model, out, plan=report.plan, tokenizer=loaded.tokenizer)
    if json:
        _print({"saved": str(out), **report.to_dict()})
        return
    before, after = report.bytes_before / 1e6, report.bytes_after / 1e6
    typer.echo(f"{len(report.converted)} layers converted, {before:.1f} MB -> {after:.1f} MB, saved in {out}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        typer.echo(f"{len(names)} left alone: {', '.join(names[:3])}{', ...' * (len(names) > 3)}: {reason}")


def _numbers(evidence: Any) -> tuple[str, str, str]:
    if "us" not in evidence:
        return "", "", ""
    return f"{evidence['us']:.1f}", f"{evidence['float_us']:.1f}", f"{evidence['error']:.3g}"


def _table(columns: tuple[str, ...], rows: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")  # nothing is cut
    for row in rows:
        table.add_row(*(escape(str(each)) for each in row))
    Console(highlight=False).print(table)


def _print(data: Any) -> None:
    typer.echo(writer.dumps(data, indent=1))


def _say(text: str) -> None:
    typer.echo(text, err=True)
