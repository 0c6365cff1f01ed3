"""Replacing the weights of a model: by rules, or along a plan."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ao_core.errors import OptionError, PlanError, PlanWarning, RejectedError
from ao_core.kernels import check_provider
from ao_core.layers import Layer, find_layers
from ao_core.metrics import model_bytes, stored_bytes
from ao_core.plan import Choice, Plan, Rule, resolve
from ao_core.progress import track
from ao_core.scheme import Scheme, parse_scheme
from ao_core.tensor import QuantizedTensor


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        plan: every layer with its scheme or the reason why it was left alone.
        bytes_before: stored bytes of the whole model before, tied weights counted once.
        bytes_after: the same after.
        converted_bytes_before: stored bytes of the converted weights before.
        converted_bytes_after: the same after.
        slower: converted layers that are expected to be slower than in float: name → why.
    """

    plan: Plan
    bytes_before: int
    bytes_after: int
    converted_bytes_before: int
    converted_bytes_after: int
    slower: Mapping[str, str] = field(default_factory=dict)

    @property
    def converted(self) -> dict[str, str]:
        """Converted layers: name → scheme."""
        return {name: c.scheme for name, c in self.plan.layers.items() if c.scheme is not None}

    @property
    def skipped(self) -> dict[str, str]:
        """Layers left alone: name → reason."""
        return {name: c.reason for name, c in self.plan.layers.items() if c.scheme is None}

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {
            "converted": self.converted,
            "skipped": self.skipped,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "converted_bytes_before": self.converted_bytes_before,
            "converted_bytes_after": self.converted_bytes_after,
            "slower": dict(self.slower),
        }

    def __str__(self) -> str:
        lines = [
            f"{len(self.converted)} layers converted, {len(self.skipped)} left alone",
            f"{self.bytes_before / 1e6:.1f} MB before, {self.bytes_after / 1e6:.1f} MB after",
        ]
        lines += [f"left alone: {n}: {why}" for n, why in self.skipped.items()]
        return "\n".join(lines + [f"slower than float: {n}: {why}" for n, why in self.slower.items()])


def quantize_(
    model: nn.Module,
    scheme: str | Scheme | Sequence[Rule],
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> Report:
    """Quantize the layers of ``model`` in place, without data.

    Args:
        model: any module; weights of its linears and of its expert stacks are replaced by quantized
            tensors, those of embeddings and convolutions where ``include`` or a rule names them.
        scheme: a scheme's name or text (``"int8-weight-only"``), a :class:`Scheme`, or a list of
            :class:`Rule` for different schemes on different layers.
        include: patterns of layers to convert; all by default. See :class:`Rule`.
        exclude: patterns of layers to leave alone; they win over ``include``.
        progress: show a progress bar.
        **options: options of the scheme, such as ``group_size=64``.

    Returns:
        What was converted, what was left alone and why, and bytes before and after.

    Raises:
        UnknownNameError, OptionError: the scheme can't be made; no plugin has the provider of a rule.
        PlanError: a pattern matches nothing, or no layer can be converted.
        RejectedError: a weight holds NaN or infinity.

    The model is unchanged if it raises.
    """
    known: dict[str, Scheme] = {}
    rules = made_rules(scheme, include, exclude, options, known)
    return _apply(model, resolve(model, rules), known, progress)


def made_rules(
    scheme: str | Scheme | Sequence[Rule],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    options: Mapping[str, Any],
    known: dict[str, Scheme],
) -> list[Rule]:
    """The rules that the arguments of :func:`quantize_` stand for; schemes in them are added to ``known``.

    Raises:
        UnknownNameError, OptionError: the scheme can't be made, or is something else.
        PlanError: rules were given together with options or patterns.
    """
    if not isinstance(scheme, (str, Scheme)):
        if options or include is not None or exclude is not None:
            raise PlanError("a list of rules takes no options, include or exclude: write them as rules.")
        rules = list(scheme) if isinstance(scheme, Iterable) else [scheme]
        for rule in rules:
            if not isinstance(rule, Rule):
                raise OptionError(
                    "a scheme is its text, such as 'int8-weight-only', an instance of one, or a list of "
                    f"rules, and {scheme!r:.60} was given."
                )
        known |= {str(rule.scheme): rule.scheme for rule in rules if isinstance(rule.scheme, Scheme)}
        return rules
    made = parse_scheme(scheme, **options)
    known[str(made)] = made
    left = [Rule(pattern, None) for pattern in _patterns(exclude, ())]
    wanted = sorted(_patterns(include, ("*",)), key=lambda pattern: pattern == "*")  # names come first
    return left + [Rule(pattern, made) for pattern in wanted]


def apply_(model: nn.Module, plan: Plan, *, progress: bool = False) -> Report:
    """Quantize the layers of ``model`` in place along ``plan``.

    Tied weights are converted once and stay tied. Warns where the plan was measured on another device than
    the model's, or with another torch.

    Raises:
        PlanError: the plan names a layer that the model lacks.
        UnknownNameError: no installed plugin has a scheme, or a kernel's provider, that it names.
        RejectedError: a scheme rejects a weight, or a weight holds NaN or infinity.

    The model is unchanged if it raises; until it returns, float and quantized weights are both held.
    """
    _warn_of_another_place(model, plan)
    return _apply(model, plan, {}, progress)


def _warn_of_another_place(model: nn.Module, plan: Plan) -> None:
    first = next(model.parameters(), None)
    if others := plan.elsewhere("cpu" if first is None else first.device):
        warnings.warn(
            f"the plan was measured elsewhere: {'; '.join(others)}. It is applied as it is; here another "
            "scheme may be the fastest: run ao autoquant.",
            PlanWarning,
            stacklevel=3,
        )


def _apply(model: nn.Module, plan: Plan, known: Mapping[str, Scheme], progress: bool) -> Report:
    jobs = planned(model, plan, known)
    rest = find_layers(model).replaceable.keys() - plan.layers.keys()
    unnamed = dict.fromkeys(rest, Choice(None, reason="the plan does not name it"))
    before = model_bytes(model).total
    weights: list[tuple[Layer, QuantizedTensor]] = []
    for layer, scheme, provider in track(jobs, "quantizing", enabled=progress):
        weights.append((layer, layer.quantize(scheme, provider=provider)))
    old = sum(stored_bytes(layer.weight) for layer, _ in weights)
    for layer, quantized in weights:
        _replace(layer, quantized)
    new = sum(stored_bytes(quantized) for _, quantized in weights)
    slower = slower_than_float({layer.name: (scheme, layer.weight) for layer, scheme, _ in jobs})
    outcome = replace(plan, layers={**plan.layers, **unnamed})
    return Report(outcome, before, model_bytes(model).total, old, new, slower)


def slower_than_float(made: Mapping[str, tuple[Scheme, torch.Tensor]]) -> dict[str, str]:
    """What :meth:`ao_core.Scheme.slower` says of each layer, where it says something."""
    reasons = {name: scheme.slower(weight) for name, (scheme, weight) in made.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def planned(
    model: nn.Module, plan: Plan, known: Mapping[str, Scheme], *, values: bool = True
) -> list[tuple[Layer, Scheme, str | None]]:
    """Each layer that ``plan`` converts, with its scheme and provider; all of them can be converted.

    Args:
        model: what the plan is for.
        plan: the plan.
        known: schemes by text that need not be registered.
        values: whether the weights must hold what the schemes ask for already; see ``Scheme.check``.

    Raises:
        PlanError, RejectedError, UnknownNameError: as for :func:`apply_`.
    """
    layers = find_layers(model).replaceable
    work = {name: choice for name, choice in plan.layers.items() if choice.scheme is not None}
    _check_layers(work, layers)
    for provider in sorted({choice.provider for choice in work.values() if choice.provider is not None}):
        check_provider(provider)
    jobs = [
        (layers[name], known.get(str(c.scheme)) or parse_scheme(str(c.scheme)), c.provider)
        for name, c in work.items()
    ]
    for layer, scheme, _ in jobs:
        _check_weight(layer, scheme, values=values)
    return jobs


def _patterns(given: str | Iterable[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if given is None:
        return default
    return (given,) if isinstance(given, str) else tuple(given)


def _check_layers(work: Iterable[str], layers: dict[str, Layer]) -> None:
    if missing := [name for name in work if name not in layers]:
        raise PlanError(
            f"the plan names {len(missing)} layers that this model can't convert: "
            f"{', '.join(missing[:5])}. Was the plan made for another model, or applied already?"
        )


def _check_weight(layer: Layer, scheme: Scheme, *, values: bool) -> None:
    try:
        if reason := layer.rejects(scheme):
            raise RejectedError(f"{scheme} can't quantize this weight: {reason}.")
        scheme.check(layer.matrix, values=values)
    except RejectedError as error:
        raise RejectedError(f"layer {layer.name!r}: {error} The model was not changed.") from error


def _replace(layer: Layer, quantized: torch.Tensor) -> None:
    parameter = nn.Parameter(quantized, requires_grad=False)
    for module, attribute in layer.owners:
        module.register_parameter(attribute, parameter)
