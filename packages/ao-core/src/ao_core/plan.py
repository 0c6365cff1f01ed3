"""Plans: which scheme each layer gets, as data that can be written, read and compared."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ao_core.errors import PlanError
from ao_core.layers import Layer, Layers, find_layers, layer_name
from ao_core.scheme import Scheme, parse_scheme
from ao_core.tensor import QuantizedTensor

FORMAT = 1


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches ``pattern`` get ``scheme``; None leaves them alone.

    Attributes:
        pattern: a shell pattern over the whole qualified name (``*`` also crosses dots), or a
            regular expression after ``re:``.
        scheme: a scheme, its text, or None.
        provider: a kernel provider to pin, or None.
    """

    pattern: str
    scheme: str | Scheme | None
    provider: str | None = None

    def __post_init__(self) -> None:
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as error:
                raise PlanError(f"{self.pattern!r} is no regular expression: {error}.") from error

    def matches(self, name: str) -> bool:
        """Whether the rule speaks of the layer called ``name``."""
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], name) is not None
        return fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Choice:
    """What one layer gets, and why.

    Attributes:
        scheme: the scheme's text, or None where the layer is left alone.
        provider: the pinned kernel provider, or None.
        reason: why it is left alone; empty where it is not.
        evidence: measurements behind the choice, JSON-able; ``us`` are microseconds.
    """

    scheme: str | None
    provider: str | None = None
    reason: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The resolved decision for a model: every layer, also those left alone.

    Attributes:
        layers: layer name → choice, sorted by name.
        fingerprint: device and versions that it was made with.
        evidence: what was measured of the plan as a whole, JSON-able.
    """

    layers: Mapping[str, Choice]
    fingerprint: Mapping[str, str] = field(default_factory=lambda: fingerprint())  # noqa: PLW0108 - defined below
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", dict(sorted(self.layers.items())))

    def to_json(self) -> str:
        """The plan as JSON text, sorted and indented so that plans can be compared line by line."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": dict(self.fingerprint),
            "layers": {name: asdict(choice) for name, choice in self.layers.items()},
        }
        if self.evidence:
            data["evidence"] = dict(self.evidence)
        return json.dumps(data, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of :meth:`to_json`.

        Raises:
            PlanError: not JSON, not a plan, or of another format version.
        """
        try:
            data = json.loads(text)
            if (version := data["format"]) != FORMAT:
                raise PlanError(
                    f"the plan has format {version}, and this ao-core reads format {FORMAT}. "
                    "Make the plan again, or install the version that wrote it."
                )
            layers = {name: Choice(**choice) for name, choice in data["layers"].items()}
            return cls(layers, data["fingerprint"], data.get("evidence", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"this is no plan: {error!r}. A plan is the JSON that ao writes.") from error

    def elsewhere(self, device: torch.device | str) -> list[str]:
        """What differs between where its times were measured and ``device`` here: another GPU, another torch.

        Empty if nothing differs, or if nothing was timed (no choice has ``us`` in its evidence).
        """
        if not any("us" in choice.evidence for choice in self.layers.values()):
            return []
        here, there = fingerprint(device), self.fingerprint
        return [
            f"{key} was {there[key]}, and is {here[key]}"
            for key in ("device", "device_name", "torch")
            if key in there and _decisive(key, there[key]) != _decisive(key, here[key])
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to ``path``; a file already there is replaced whole or not at all."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from ``path``.

        Raises:
            PlanError: the file can't be read, or as :meth:`from_json`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} can't be read: {error}. Give a file that Plan.save wrote.") from error
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _decisive(key: str, value: str) -> str:
    """Of a version of torch its major and minor number."""
    return ".".join(value.split(".")[:2]) if key == "torch" else value


def fingerprint(device: torch.device | str = "cpu") -> dict[str, str]:
    """Device and versions, as far as they decide speed."""
    device = torch.device(device)
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": device.type,
        "device_name": name,
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def resolve(model: nn.Module, rules: Sequence[Rule]) -> Plan:
    """Apply ``rules`` to the layers of ``model``; the first that matches a layer wins.

    Embeddings, convolutions, and linears that share their weight with another kind of module are left
    alone unless a rule other than ``*`` names them.

    Raises:
        PlanError: a rule matches no layer; no layer can be converted.
        UnknownNameError, OptionError: a rule's scheme can't be made.
    """
    found = find_layers(model)
    schemes = {rule: None if rule.scheme is None else parse_scheme(rule.scheme) for rule in rules}
    _check_matches(rules, found)
    choices = {name: Choice(None, reason=reason) for name, reason in found.left.items()}
    for name, layer in found.replaceable.items():
        rule = next((r for r in rules if any(map(r.matches, _names(layer)))), None)
        choices[name] = _choice(layer, rule, schemes)
        if choices[name].scheme is not None:
            tied = Choice(None, reason=f"it shares the weight of {name}, which is converted")
            choices |= dict.fromkeys(layer.shared, tied)
    if not any(choice.scheme for choice in choices.values()):
        raise PlanError(_nothing(model, choices))
    return Plan(choices)


def plan_of(model: nn.Module) -> Plan:
    """The plan that ``model`` already follows: its quantized layers, and those that are not."""
    found = find_layers(model)
    choices = {name: Choice(None, reason="left in float") for name in found.replaceable}
    choices |= {name: Choice(None, reason=reason) for name, reason in found.left.items()}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, QuantizedTensor):
                choices[layer_name(name, attribute)] = Choice(parameter.scheme, parameter.provider)
    return Plan(choices)


def _choice(layer: Layer, rule: Rule | None, schemes: Mapping[Rule, Scheme | None]) -> Choice:
    if rule is None:
        return Choice(None, reason="no rule matches it")
    scheme = schemes[rule]
    if scheme is None:
        return Choice(None, reason=f"excluded by rule {rule.pattern!r}")
    if layer.shared and rule.pattern == "*":
        shared = ", ".join(layer.shared)
        return Choice(None, reason=f"its weight is tied to {shared}; name it in a rule to convert both")
    if layer.kind in ("embedding", "convolution") and rule.pattern == "*":
        return Choice(None, reason=f"{layer.kind} weights are converted only where a rule names them")
    if reason := layer.rejects(scheme):
        return Choice(None, reason=reason)
    return Choice(str(scheme), rule.provider)


def _names(layer: Layer) -> tuple[str, ...]:
    return (layer.name, *layer.aliases, *layer.shared)


def _check_matches(rules: Sequence[Rule], found: Layers) -> None:
    if not rules:
        raise PlanError("no rules were given. Give at least one, such as Rule('*', 'int8-weight-only').")
    usable = [n for layer in found.replaceable.values() for n in (layer.name, *layer.aliases)]
    shared = [name for layer in found.replaceable.values() for name in layer.shared]
    for rule in rules:
        if any(map(rule.matches, [*usable, *shared])):
            continue
        hit = [name for name in found.left if rule.matches(name)]
        if rule.pattern == "*" or (hit and rule.scheme is None):
            continue
        if hit:
            raise PlanError(
                f"rule {rule.pattern!r} matches only what can't be converted: {hit[0]}: {found.left[hit[0]]}."
            )
        raise PlanError(
            f"rule {rule.pattern!r} matches none of the {len(usable)} layers that can be converted "
            f"({', '.join([*usable[:3], '...'][: len(usable)])}). Patterns match the whole name: try "
            "'*q_proj' or 're:.*q_proj'."
        )


def _nothing(model: nn.Module, choices: Mapping[str, Choice]) -> str:
    text = f"{type(model).__name__} has no layer that can be converted"
    reasons = [f"{name}: {choice.reason}" for name, choice in list(choices.items())[:4]]
    more = f" (and {len(choices) - 4} more)" if len(choices) > 4 else ""
    return f"{text}: {'; '.join(reasons) or 'it has no weight of two dimensions'}{more}."
