"""A chosen plan carried out by algorithms that need data, such as GPTQ, instead of by rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ao_autoquant.exchange import restoring
from ao_core import (
    Algorithm,
    BlockAlgorithm,
    CompressReport,
    OptionError,
    Plan,
    Scheme,
    UnknownNameError,
    apply_,
    compress_,
    find_layers,
    parse_algorithm,
    parse_scheme,
)

_HOMES = {"gptq": "ao-gptq", "smoothquant": "ao-quant"}
"""Where to find what is usually asked for, if it is not installed."""


def algorithms_of(given: str | Algorithm | Sequence[str | Algorithm]) -> list[Algorithm]:
    """The algorithms that ``given`` names.

    Raises:
        OptionError: an option that one does not have.
        UnknownNameError: one is not installed; says what to install.
    """
    listed: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    return [_algorithm(each) for each in listed]


def _algorithm(given: str | Algorithm) -> Algorithm:
    try:
        return parse_algorithm(given)
    except UnknownNameError as error:
        name = str(given).partition(":")[0]
        if name not in _HOMES:
            raise
        raise UnknownNameError(f"{error} Install it: pip install {_HOMES[name]}") from error


def refine_(
    model: nn.Module,
    plan: Plan,
    algorithms: str | Algorithm | Sequence[str | Algorithm],
    batches: Iterable[Any],
    *,
    progress: bool = False,
) -> CompressReport:
    """Convert ``model`` in place along ``plan`` with the help of ``algorithms``.

    Layers whose scheme an algorithm can't take are rounded, before the walk, so that the layers after them
    see what they give; the plan of the report says so of each (``evidence["refine"]``).

    Args:
        model: in float, as the plan found it.
        plan: what each layer gets.
        algorithms: as for :func:`ao_core.compress_`.
        batches: to calibrate on.
        progress: show a bar.

    Raises:
        UnknownNameError, OptionError: an algorithm is not installed, or none of the plan's layers suits it.
        PlanError, RejectedError, ModelError: as for :func:`ao_core.compress_`.

    The model is unchanged if it raises.
    """
    made = algorithms_of(algorithms)
    layers = find_layers(model).replaceable
    work = {name: choice for name, choice in plan.layers.items() if choice.scheme is not None}
    schemes = {name: parse_scheme(str(choice.scheme)) for name, choice in work.items()}
    kept = {
        name: f"it is no matrix that is walked, but {layers[name].kind}"
        for name in schemes
        if name in layers and layers[name].kind not in ("linear", "experts")
    }
    kept |= unsuited(made, {name: scheme for name, scheme in schemes.items() if name not in kept})
    walked = {name: choice for name, choice in work.items() if name not in kept}
    if not walked:
        why = "; ".join(dict.fromkeys(kept.values())) or "the plan leaves every layer in float"
        names = ", ".join(each.name for each in made)
        raise OptionError(f"{names} can refine none of the plan's layers: {why}. Leave refine out.")
    rounded = {name: work[name] for name in kept}
    with restoring(layers[name] for name in rounded if name in layers):
        first = apply_(model, Plan(rounded)) if rounded else None
        report = compress_(model, made, batches, scheme=Plan(walked), progress=progress)
    outcome = dict(plan.layers) | {name: report.plan.layers[name] for name in walked}
    for name, why in kept.items():
        outcome[name] = replace(work[name], evidence={**work[name].evidence, "refine": f"rounded: {why}"})
    if first is None:
        return replace(report, plan=replace(plan, layers=outcome))
    return replace(
        report,
        plan=replace(plan, layers=outcome),
        bytes_before=first.bytes_before,
        converted_bytes_before=first.converted_bytes_before + report.converted_bytes_before,
        converted_bytes_after=first.converted_bytes_after + report.converted_bytes_after,
        slower={**first.slower, **report.slower},
    )


def unsuited(algorithms: Sequence[Algorithm], schemes: Mapping[str, Scheme]) -> dict[str, str]:
    """Layers that keep one of ``algorithms`` from taking the others → why."""
    out: dict[str, str] = {}
    for each in algorithms:
        left = {name: scheme for name, scheme in schemes.items() if name not in out}
        if not isinstance(each, BlockAlgorithm) or not left:
            continue
        try:
            each.check(left)
        except OptionError:
            refused = {name: why for name, scheme in left.items() if (why := each.rejects(scheme))}
            if not refused:  # it is no single layer that does not suit
                raise
            out |= {name: f"{each.name}: {why}" for name, why in refused.items()}
    return out
