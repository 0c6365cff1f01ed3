"""``ao compress``: quantize a language model with the help of text."""

from __future__ import annotations

import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ao_core.arguments import Device, Dtype, parse_device, parse_dtype
from ao_core.cli import output
from ao_core.cli.listing import Json
from ao_core.cli.modelling import Model, Verbose, show_report
from ao_core.errors import OptionError

if TYPE_CHECKING:
    import torch

    from ao_core.algorithm import Algorithm
    from ao_core.compress import CompressReport


def compress(
    model: Model,
    algorithm: Annotated[
        list[str],
        typer.Option(metavar="A", help="NAME or NAME:OPTION=VALUE,...; give several to apply them in turn."),
    ],
    calibration: Annotated[
        str,
        typer.Option(metavar="FILE", help="UTF-8 text, a saved data set, or datasets:NAME, to calibrate on."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to save.")],
    scheme: Annotated[
        str | None, typer.Option(metavar="S", help="NAME or NAME:OPTION=VALUE,...; see 'ao schemes'.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of weights to zero, for those that prune.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="N:M", help="Keep N of M neighbouring weights, for those that prune."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text to calibrate on, at most.")] = 128,
    context: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 512,
    packed: Annotated[
        bool, typer.Option("--packed/--padded", help="Cut joined texts, or pad each to the context.")
    ] = True,
    column: Annotated[str, typer.Option(metavar="NAME", help="Of a data set.")] = "text",
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A SentencePiece .model instead of the model's own.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep finished blocks there; go on if killed.")
    ] = None,
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
    """Compress MODEL's layers, calibrated on text, and save it."""
    output.show_log(verbose)
    from ao_core.calibrate import processes

    made = parse_algorithms(algorithm, sparsity=sparsity, pattern=pattern)
    with processes.started(parse_device(device)) as where:
        _compress(
            model, made, algorithm, calibration, out, scheme, samples, context, packed, column, tokenizer,
            resume, include, exclude, parse_dtype(dtype), where, json,
        )  # fmt: skip


def _compress(
    model: str,
    made: list[Algorithm],
    algorithm: list[str],
    calibration: str,
    out: Path,
    scheme: str | None,
    samples: int,
    context: int,
    packed: bool,
    column: str,
    tokenizer: Path | None,
    resume: Path | None,
    include: list[str] | None,
    exclude: list[str] | None,
    dtype: torch.dtype | None,
    device: torch.device,
    json: bool,
) -> None:
    """In each of the processes that take part; the first one speaks and saves."""
    from ao_core.calibrate import SentencePiece, processes, read_texts, tokenized
    from ao_core.checkpoint import save
    from ao_core.compress import BlockAlgorithm, compress_
    from ao_core.metrics import sparsity as zeros_of
    from ao_core.models import load_model
    from ao_core.scheme import parse_scheme
    from ao_core.shards import check_target

    first = processes.rank() == 0
    wanted = None if scheme is None else parse_scheme(scheme)
    for each in made if wanted is not None else ():
        if isinstance(each, BlockAlgorithm):
            each.check({"every layer": wanted})
    check_target(out)
    texts = read_texts(calibration, column=column)
    if first:
        output.say(f"loading {model}")
    own = None if tokenizer is None else SentencePiece(tokenizer)
    loaded = load_model(model, dtype=dtype)  # on the CPU: one block at a time is brought there
    batches = tokenized(
        texts, own or loaded.tokenizer, samples=samples, context=context, packed=packed, source=calibration
    )
    if first and len(batches) < samples:
        kind = "windows" if packed else "texts"
        output.warn(
            f"{calibration} holds {len(batches)} {kind} of {context} tokens; {samples} were asked for"
        )
    report = compress_(
        loaded.model,
        made,
        batches,
        scheme=wanted,
        include=include or None,
        exclude=exclude or None,
        device=device,
        progress=first,
        resume=resume,
    )
    if not first:
        return
    save(loaded.model, out, plan=report.plan, tokenizer=loaded.tokenizer)
    if resume is not None:
        shutil.rmtree(resume)
    zeros = zeros_of(loaded.model)
    if json:
        output.as_json({**_data(algorithm, scheme, batches, context, out, report), "sparsity": zeros})
        return
    show_report(report, " + ".join([*algorithm, *([scheme] if scheme else [])]), out)
    if zeros >= 0.01:
        output.say(f"{100 * zeros:.1f}% of the linears' weights are zero")
    output.say(f"calibrated {report.walk} on {len(batches)} windows of {context} tokens")
    for line in _exceptions(report):
        output.say(line)


def parse_algorithms(texts: list[str], **options: Any) -> list[Algorithm]:
    """The algorithms that ``texts`` name, each with those of ``options`` that are not None and that it has.

    Raises:
        OptionError: none of them has an option that is given; or as :func:`ao_core.parse_algorithm`.
    """
    from ao_core.algorithm import ALGORITHMS, parse_algorithm
    from ao_core.scheme import split_text

    given = {name: value for name, value in options.items() if value is not None}
    known: list[set[str]] = [
        {field.name for field in fields(kind)} if is_dataclass(kind) else set()
        for kind in (ALGORITHMS.get(split_text(text)[0]) for text in texts)
    ]
    if idle := [name for name in given if not any(name in names for names in known)]:
        raise OptionError(
            f"--{idle[0]} was given, and none of {', '.join(texts)} has an option {idle[0]}. Leave it "
            "out, or add an algorithm that prunes, such as --algorithm wanda."
        )
    return [
        parse_algorithm(text, **{name: value for name, value in given.items() if name in names})
        for text, names in zip(texts, known, strict=True)
    ]


def _exceptions(report: CompressReport) -> list[str]:
    """What algorithms noted of layers that did not go as the others."""
    said: dict[str, list[str]] = {}
    for name, facts in report.notes.items():
        for each in facts.get("experts", [facts]):
            what = each.get("gptq")
            if isinstance(what, str) and what != "done":
                said.setdefault(what, []).append(name)
    return [
        f"{len(names)} of {len(report.notes)}: {what} ({', '.join(dict.fromkeys(names[:3]))}"
        f"{', ...' if len(names) > 3 else ''})"
        for what, names in said.items()
    ]


def _data(
    algorithm: list[str],
    scheme: str | None,
    batches: list[Any],
    context: int,
    out: Path,
    report: CompressReport,
) -> dict[str, Any]:
    return {
        "algorithms": algorithm,
        "scheme": scheme,
        "samples": len(batches),
        "context": context,
        "saved": str(out),
        **report.to_dict(),
    }
