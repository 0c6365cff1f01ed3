"""Finding the weights of a model that a scheme may replace, and saying why the others are left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from ao_core.tensor import QuantizedTensor


@dataclass
class Layer:
    """A weight that can be replaced.

    Attributes:
        name: qualified name of the module that owns it.
        owners: every (module, parameter name) that holds the parameter; one, unless it is tied.
        aliases: names of further linears that hold the same weight.
        shared: names of modules other than linears that hold it too, such as a tied embedding.
    """

    name: str
    owners: list[tuple[nn.Module, str]]
    aliases: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)

    @property
    def weight(self) -> torch.Tensor:
        """The parameter as it is now, ``[..., N, K]``."""
        module, attribute = self.owners[0]
        return getattr(module, attribute)  # type: ignore[no-any-return]


@dataclass
class Layers:
    """What :func:`find_layers` found: replaceable weights, and a reason for each of the others."""

    replaceable: dict[str, Layer]
    left: dict[str, str]


@dataclass
class _Use:
    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    reason: str | None


def find_layers(model: nn.Module) -> Layers:
    """Look at every parameter of ``model`` with two dimensions or more.

    Linear weights are replaceable. Everything else is left alone with a reason: weights of other
    modules, of ``nn.MultiheadAttention`` (which does not call its linears), parametrized ones, and
    those quantized already. Norms and biases have one dimension and are not listed.
    """
    uses = list(_uses(model))
    layers: dict[int, Layer] = {}
    for use in uses:
        if use.reason is not None:
            continue
        owner = (use.module, use.attribute)
        if id(use.parameter) in layers:
            layers[id(use.parameter)].owners.append(owner)
            layers[id(use.parameter)].aliases.append(use.name)
        else:
            layers[id(use.parameter)] = Layer(use.name, [owner])
    left = _parametrized(model)
    for use in uses:
        if use.reason is None:
            continue
        left[use.name] = use.reason
        if id(use.parameter) in layers:
            layers[id(use.parameter)].owners.append((use.module, use.attribute))
            layers[id(use.parameter)].shared.append(use.name)
    return Layers({layer.name: layer for layer in layers.values()}, left)


def layer_name(module_name: str, attribute: str) -> str:
    """How plans call a parameter: the module's name for ``weight``, else ``module.attribute``."""
    return module_name if attribute == "weight" else f"{module_name}.{attribute}".lstrip(".")


def _uses(model: nn.Module) -> Iterator[_Use]:
    attention = _attention_parts(model)
    for name, module in model.named_modules():
        if "parametrizations" in name.split("."):
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                reason = _reason(module, attribute, parameter, attention.get(name))
                yield _Use(layer_name(name, attribute), module, attribute, parameter, reason)


def _reason(module: nn.Module, attribute: str, parameter: nn.Parameter, attention: str | None) -> str | None:
    if isinstance(parameter, QuantizedTensor):
        return f"it is quantized already ({parameter.scheme})"
    if attention is not None:
        return f"nn.MultiheadAttention {attention!r} uses it without calling a Linear"
    kind = type(module).__name__
    if not isinstance(module, nn.Linear):
        return f"it belongs to {kind}, which is no nn.Linear"
    if attribute != "weight":
        return f"it is not the weight of its {kind}"
    return None


def _attention_parts(model: nn.Module) -> dict[str, str]:
    parts: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            parts[name] = parts[f"{name}.out_proj".lstrip(".")] = name
    return parts


def _parametrized(model: nn.Module) -> dict[str, str]:
    reason = "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    return {
        layer_name(name, attribute): reason
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for attribute in module.parametrizations
    }
