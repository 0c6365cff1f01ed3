"""``explore``: profile a model and measure candidates; plans for any budget come from what was found."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ao_autoquant.cache import Cache
from ao_autoquant.known import FORMAT, known_from, load
from ao_autoquant.measure import Digests
from ao_autoquant.measuring import Faulty, Measurer
from ao_autoquant.profile import Profile, as_examples, profile
from ao_autoquant.search import FLOAT, Budget, Objective, Option, Totals, groups_of, solve, totals
from ao_autoquant.sensitivity import Measure, Sensitivity, checked_measure, sensitivity, source_of
from ao_core import Choice, Plan, PlanError, fingerprint, model_bytes, parse_scheme, propose, reporting

Isolate = Literal["auto"] | bool


@dataclass(frozen=True)
class Exploration:
    """All that was measured on a model: plans for any budget come from it without measuring again.

    Attributes:
        options: layer → candidate → what was measured; ``"float"`` is always there.
        rejected: layer → scheme → the scheme's reason.
        faults: schemes that crashed, hung or returned garbage.
        left: layer → why it was not searched.
        calls: layer → rows → how often.
        other_bytes: of the model outside the searched layers.
        fingerprint: device and versions.
        source: changes with all that errors depend on: the model's values, the inputs, how they are measured.
        measure: of errors: ``"output"``, ``"loss"`` or ``"kl"``, see :func:`explore`.
        measured: how many numbers were measured, and ``reused``: how many equal layers shared, or were known
            before.
    """

    options: dict[str, dict[str, Option]]
    rejected: dict[str, dict[str, str]]
    faults: list[Faulty]
    left: dict[str, str]
    calls: dict[str, dict[int, float]]
    other_bytes: int
    fingerprint: dict[str, str]
    measure: Measure = "output"
    source: str = ""
    measured: int = 0
    reused: int = 0
    proposals: dict[str, str] = field(default_factory=dict)

    def choose(
        self,
        objective: Objective = "latency",
        budget: Budget | None = None,
        together: Sequence[Sequence[str]] = (),
    ) -> dict[str, str]:
        """Layer → candidate, see :func:`ao_autoquant.search.solve`. ``together`` are groups of patterns.

        Layers whose names differ only in what the patterns of a group name, such as ``*.q_proj`` and
        ``*.k_proj`` of one block, get the same candidate.
        """
        return solve(
            self.options,
            objective=objective,
            budget=budget,
            other_bytes=self.other_bytes,
            together=groups_of(self.options, together),
            additive=self.additive,
        )

    def totals(self, chosen: Mapping[str, str]) -> Totals:
        """Time, bytes and error of a choice."""
        return totals(self.options, chosen, self.other_bytes, additive=self.additive)

    @property
    def additive(self) -> bool:
        """Whether errors are nats, which add up; else their root mean square counts."""
        return self.measure != "output"

    def uniform(self) -> dict[str, dict[str, str]]:
        """Scheme → the choice that gives it to every layer that takes it, and float to the others."""
        names = sorted({name for each in self.options.values() for name in each})
        return {
            name: {layer: name if name in each else FLOAT for layer, each in self.options.items()}
            for name in names
        }

    def plan(
        self,
        objective: Objective = "latency",
        budget: Budget | None = None,
        together: Sequence[Sequence[str]] = (),
    ) -> Plan:
        """The best plan under ``budget``.

        Raises:
            InfeasibleError: no plan fits; says which constraint, and what is reachable.
        """
        return self.plan_for(self.choose(objective, budget, together), objective)

    def plan_for(
        self, chosen: Mapping[str, str], objective: str = "latency", *, uniform: str | None = None
    ) -> Plan:
        """The plan that gives each layer the chosen candidate, with what was measured.

        ``uniform``: the scheme that all layers get that take it, which is then why others are float.
        """
        layers = {name: Choice(None, reason=reason) for name, reason in self.left.items()}
        for layer, name in chosen.items():
            layers[layer] = self._choice(layer, name, objective)
            if uniform is not None and name == FLOAT:
                layers[layer] = replace(layers[layer], reason=self._why_not(layer, uniform))
        return Plan(layers, self.fingerprint)

    def _why_not(self, layer: str, uniform: str) -> str:
        """Why a layer is float where all others get one scheme."""
        if uniform == FLOAT:
            return "float was best when measured on the whole model"
        why = self.rejected.get(layer, {}).get(uniform, "it could not be measured on this layer")
        return f"{uniform} was best when measured on the whole model, and does not fit here: {why}"

    def _choice(self, layer: str, name: str, objective: str) -> Choice:
        options = self.options[layer]
        mine, base = options[name], options[FLOAT]
        evidence = {
            **asdict(mine),
            "error_measure": self.measure,
            "source": self.source,
            "float_us": base.us,
            "float_spread": base.spread,
            "float_bytes": base.bytes,
            "calls": {str(rows): count for rows, count in self.calls[layer].items()},
        }
        if name != FLOAT:
            return Choice(name, evidence=evidence)
        others = {key: value for key, value in options.items() if key != FLOAT}
        return Choice(None, reason=_why_float(others, base, objective), evidence=evidence)

    def to_json(self) -> str:
        """The measurements as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Exploration:
        """Read what :meth:`save` wrote.

        Raises:
            PlanError: the file can't be read, or holds something else.
        """
        found = load(path)
        if not isinstance(found, cls):
            raise PlanError(f"{path} is a plan, and no exploration. Give what Exploration.save wrote.")
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to ``path``, whole or not at all."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def explore(
    model: nn.Module,
    examples: Any,
    *,
    weights: Sequence[float] | None = None,
    schemes: Sequence[str] | None = None,
    error: Measure = "output",
    calibration: Any = None,
    known: Plan | Exploration | None = None,
    wanted: Callable[[nn.Module, str], bool] | None = None,
    compiled: bool = False,
    isolate: Isolate = "auto",
    limit_s: float = 180.0,
    remeasure: bool = False,
    progress: bool = False,
) -> Exploration:
    """Profile ``model`` on ``examples`` and measure every candidate on every linear. Changes nothing.

    Args:
        model: any module, on the device that it will run on.
        examples: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a list of
            these.
        weights: how often each example runs, such as ``[1, 128]`` for a prompt and 128 decoded tokens.
        schemes: texts of the only schemes to measure; by default every installed one with its defaults, and
            what plugins propose.
        error: how errors are measured. ``"output"``: ``|y' - y| / |y|`` of the layer's output.
            ``"loss"``: nats that it costs the model's predictions, estimated from gradients, for each row of
            logits. ``"kl"``: the same, measured by running the model with that layer changed. The last two
            need a model whose output holds logits; see :mod:`ao_autoquant.sensitivity`.
        calibration: inputs for ``"loss"`` and ``"kl"``, in the form of ``examples``; by default these.
        known: what an earlier search found, perhaps on another device: an exploration, or a plan (which holds
            the chosen schemes only). Its errors are not measured again if they were measured in the same way
            on this model and these inputs, its times not if they were measured on this device.
        wanted: ``wanted(module, name)``: which linears to search.
        compiled: time the linears as ``torch.compile`` makes them.
        isolate: measure in a child process: ``"auto"``, what was not measured on that shape before; True,
            all; False, nothing.
        limit_s: seconds that one candidate may take in the child.
        remeasure: measure again what the cache knows.
        progress: show a bar.

    Raises:
        OptionError: no example, weights that don't fit, an unknown scheme's option.
        ModelError: the model is on the meta device or has no linear to search; ``error`` needs logits, and
            the model returns none.

    What the model itself raises on the examples comes through; the model is unchanged.
    """
    checked_measure(error)
    only = None if schemes is None else {str(made): made for made in map(parse_scheme, schemes)}
    batches = as_examples(examples if calibration is None else calibration)
    seen = profile(model, examples, weights=weights, wanted=wanted)
    digests = Digests()
    source = source_of(model, error, as_examples(examples), batches, digests)
    return measured(
        model, seen, only=only, judge=sensitivity(error, model, seen.seen, batches, source), measure=error,
        source=source, known=known, compiled=compiled, isolate=isolate, limit_s=limit_s, remeasure=remeasure,
        progress=progress, digests=digests,
    )  # fmt: skip


def measured(
    model: nn.Module,
    seen: Profile,
    *,
    only: Mapping[str, Any] | None = None,
    judge: Sensitivity | None = None,
    measure: Measure = "output",
    source: str = "",
    known: Plan | Exploration | None = None,
    compiled: bool = False,
    isolate: Isolate = "auto",
    limit_s: float = 180.0,
    remeasure: bool = False,
    progress: bool = False,
    digests: Digests | None = None,
) -> Exploration:
    """Measure the candidates on what was profiled; the second half of :func:`explore`."""
    options: dict[str, dict[str, Option]] = {}
    rejected: dict[str, dict[str, str]] = {}
    proposals: dict[str, str] = {}
    place = _fingerprint(model)
    measurer = Measurer(
        Cache(reread=not remeasure), compiled=compiled, isolate=isolate, limit_s=limit_s, sensitivity=judge,
        known=known_from(known, place, source), digests=digests,
    )  # fmt: skip
    measurer.share(seen.seen)
    with measurer, torch.no_grad(), reporting("measuring", enabled=progress) as show:
        for done, (name, each) in enumerate(seen.seen.items()):
            show(done, len(seen.seen))
            found = propose(name, each.layer.weight, None if each.by_module else each.sample)
            proposals |= found.faults
            candidates = found.schemes if only is None else only
            rejected[name] = {
                text: reason
                for text, scheme in candidates.items()
                if (reason := _rejects(each.layer, scheme)) is not None
            }
            fit = {text: scheme for text, scheme in candidates.items() if text not in rejected[name]}
            options[name] = measurer.options(name, each, fit, rejected[name])
    searched = sum(each[FLOAT].bytes for each in options.values())
    return Exploration(
        options=options,
        rejected=rejected,
        faults=list(measurer.faults.values()),
        left=seen.left,
        calls={name: each.calls for name, each in seen.seen.items()},
        other_bytes=model_bytes(model).total - searched,
        fingerprint=place,
        measure=measure,
        source=source,
        measured=measurer.measured,
        reused=measurer.reused,
        proposals=proposals,
    )


def _rejects(layer: Any, scheme: Any) -> str | None:
    try:
        reason: str | None = layer.rejects(scheme)
    except Exception as error:  # noqa: BLE001 - a stranger's code: the report names it
        return f"rejects() raised {type(error).__name__}: {error}"
    return reason


def _fingerprint(model: nn.Module) -> dict[str, str]:
    first = next(model.parameters(), None)
    return fingerprint("cpu" if first is None else first.device)


def _why_float(others: Mapping[str, Option], base: Option, objective: str) -> str:
    if not others:
        return "no scheme could be measured on it"
    name, best = min(others.items(), key=lambda item: item[1].us)
    noise = best.spread + base.spread
    if not math.isfinite(best.us) or objective != "latency":
        return "float is best under these constraints"
    if best.us + noise >= base.us:
        return (
            f"float is not beaten by more than the spread: {base.us:.1f} µs, and the fastest, {name}, "
            f"takes {best.us:.1f} ± {noise:.1f} µs"
        )
    return (
        f"float is needed for the constraints; the fastest, {name}, takes {best.us:.1f} of {base.us:.1f} µs"
    )
