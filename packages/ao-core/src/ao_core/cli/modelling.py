"""``ao quantize`` and ``ao eval``: what they do to a model, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ao_core.arguments import Device, Dtype, parse_device, parse_dtype
from ao_core.cli import output
from ao_core.cli.listing import Json

MODEL_HELP = "A Hugging Face directory or hub id, a GGUF file, or a directory that ao saved."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what is done.")]


def quantize(
    model: Model,
    scheme: Annotated[
        str, typer.Option(metavar="S", help="NAME or NAME:OPTION=VALUE,...; see 'ao schemes'.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to save.")],
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only layers that match.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="No layers that match.")
    ] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Quantize MODEL's linear layers without data, and save it."""
    output.show_log(verbose)
    from ao_core.checkpoint import save
    from ao_core.convert import quantize_
    from ao_core.models import load_model
    from ao_core.scheme import parse_scheme
    from ao_core.shards import check_target

    made = parse_scheme(scheme)
    check_target(out)
    output.say(f"loading {model}")
    loaded = load_model(model, dtype=parse_dtype(dtype), device=parse_device(device))
    report = quantize_(loaded.model, made, include=include or None, exclude=exclude or None, progress=True)
    save(loaded.model, out, plan=report.plan, tokenizer=loaded.tokenizer)
    if json:
        output.as_json({"scheme": str(made), "saved": str(out), **report.to_dict()})
        return
    show_report(report, str(made), out)


def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to score.")],
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows; by default half of one.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Score the first so many tokens only.")
    ] = None,
    speed: Annotated[bool, typer.Option(help="Also time prefill and decode.")] = True,
    dtype: Dtype = None,
    device: Device = "cpu",
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Measure MODEL: perplexity with its standard error, tokens a second, bytes, share of zeros."""
    output.show_log(verbose)
    from ao_core import metrics, token_speed
    from ao_core.models import load_model, tokenize_file
    from ao_core.progress import reporting

    if not text.is_file():
        from ao_core.errors import ModelError

        raise ModelError(f"there is no text file {text}. Give a UTF-8 text with --text FILE.")
    output.say(f"loading {model}")
    loaded = load_model(model, dtype=parse_dtype(dtype), device=parse_device(device))
    step = stride or context // 2
    tokens = tokenize_file(text, loaded.tokenizer, max_tokens=max_tokens)
    with reporting("scoring") as show:
        score = metrics.perplexity(loaded.model, tokens, context=context, stride=step, progress=show)
    timing = token_speed.speed(loaded.model, tokens) if speed else None
    result = {
        "model": model,
        "text": str(text),
        "tokens": score.tokens_scored,
        "context": context,
        "stride": step,
        "perplexity": score.perplexity,
        "perplexity_se": score.ppl_se,
        "nll": score.nll,
        "nll_se": score.nll_se,
        "prefill_tokens_per_s": timing.prefill_tokens_per_s if timing else None,
        "decode_tokens_per_s": timing.decode_tokens_per_s if timing else None,
        "bytes": metrics.model_bytes(loaded.model).total,
        "sparsity": metrics.sparsity(loaded.model),
    }
    if json:
        output.as_json(result)
        return
    _show_evaluation(result)


def show_report(report: Any, scheme: str, out: Path) -> None:
    """Print what a conversion did: counts, bytes, and what was left alone by reason."""
    before, after = report.converted_bytes_before, report.converted_bytes_after
    rows: list[list[object]] = [
        ["layers converted", len(report.converted)],
        ["layers left alone", len(report.skipped)],
        ["converted weights, MB", f"{output.megabytes(before)} -> {output.megabytes(after)}"],
        [
            "whole model, MB",
            f"{output.megabytes(report.bytes_before)} -> {output.megabytes(report.bytes_after)}",
        ],
        ["saved to", out],
    ]
    output.table(f"{scheme}", ("", ""), rows)
    for title, reasons in (("left alone", report.skipped), ("slower than float", report.slower)):
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).append(name)
        if by_reason:
            rows = [[len(names), _some(names), reason] for reason, names in by_reason.items()]
            output.table(f"\n{title} (--json names every layer)", ("", "layers", "why"), rows)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _show_evaluation(result: dict[str, Any]) -> None:
    known = math.isfinite(result["nll_se"])
    rows = [
        ["perplexity", f"{result['perplexity']:.4f}" + f" ± {result['perplexity_se']:.4f}" * known],
        ["NLL per token", f"{result['nll']:.5f}" + f" ± {result['nll_se']:.5f}" * known],
        ["tokens scored", result["tokens"]],
        ["stored, MB", output.megabytes(result["bytes"])],
        ["zeros in linears", f"{100 * result['sparsity']:.1f}%"],
    ]
    rows += [
        [f"{kind}, tokens/s", f"{result[f'{kind}_tokens_per_s']:.1f}"]
        for kind in ("prefill", "decode")
        if result[f"{kind}_tokens_per_s"] is not None
    ]
    output.table("", ("", ""), rows)
