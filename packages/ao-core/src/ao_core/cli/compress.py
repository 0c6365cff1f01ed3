"""``ao compress``: quantize a language model with the help of text."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ao_core.cli import output
from ao_core.cli.listing import Json
from ao_core.cli.modelling import Device, Dtype, Model, Verbose, parse_device, parse_dtype, show_report
from ao_core.errors import ModelError, OptionError

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
    calibration: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to calibrate on.")],
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
    from ao_core.checkpoint import save
    from ao_core.compress import compress_
    from ao_core.metrics import sparsity as zeros_of
    from ao_core.models import load_model, tokenize_file
    from ao_core.scheme import parse_scheme
    from ao_core.shards import check_target

    made = parse_algorithms(algorithm, sparsity=sparsity, pattern=pattern)
    wanted = None if scheme is None else parse_scheme(scheme)
    check_target(out)
    if not calibration.is_file():
        raise ModelError(f"there is no text file {calibration}. Give a UTF-8 text with --calibration FILE.")
    output.say(f"loading {model}")
    where = parse_device(device)
    loaded = load_model(model, dtype=parse_dtype(dtype))  # on the CPU: one block at a time is brought there
    tokens = tokenize_file(calibration, loaded.tokenizer, max_tokens=samples * context)
    batches = windows(tokens, samples=samples, context=context, source=str(calibration))
    report = compress_(
        loaded.model,
        made,
        batches,
        scheme=wanted,
        include=include or None,
        exclude=exclude or None,
        device=where,
        progress=True,
    )
    save(loaded.model, out, plan=report.plan, tokenizer=loaded.tokenizer)
    zeros = zeros_of(loaded.model)
    if json:
        output.as_json({**_data(algorithm, scheme, batches, out, report), "sparsity": zeros})
        return
    show_report(report, " + ".join([*algorithm, *([scheme] if scheme else [])]), out)
    if zeros >= 0.01:
        output.say(f"{100 * zeros:.1f}% of the linears' weights are zero")
    output.say(f"calibrated {report.walk} on {len(batches)} windows of {context} tokens")


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


def windows(tokens: torch.Tensor, *, samples: int, context: int, source: str) -> list[torch.Tensor]:
    """The first ``samples`` windows ``[1, context]`` of ``tokens`` ``[n]``, fewer if the text ends.

    Raises:
        ModelError: the text is shorter than one window.
    """
    count = min(samples, len(tokens) // context)
    if count < 1:
        raise ModelError(
            f"{source} holds {len(tokens)} tokens, fewer than one window of {context}. Give a longer text, "
            "or a smaller --context."
        )
    if count < samples:
        output.warn(f"{source} holds {count} windows of {context} tokens; {samples} were asked for")
    return list(tokens[: count * context].view(count, 1, context))


def _data(
    algorithm: list[str], scheme: str | None, batches: list[torch.Tensor], out: Path, report: CompressReport
) -> dict[str, Any]:
    return {
        "algorithms": algorithm,
        "scheme": scheme,
        "samples": len(batches),
        "context": batches[0].shape[1],
        "saved": str(out),
        **report.to_dict(),
    }
