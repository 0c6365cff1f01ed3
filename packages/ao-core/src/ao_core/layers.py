"""Finding the weights of a model that a scheme may replace, and saying why the others are left alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from ao_core.scheme import Scheme
from ao_core.tensor import ConvWeight, QuantizedTensor

Kind = Literal["linear", "experts", "embedding", "convolution"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Layer:
    """A weight that can be replaced.

    Attributes:
        name: qualified name of the module that owns it.
        kind: what multiplies by it. Embeddings and convolutions are converted only if a rule names them.
        owners: every (module, parameter name) that holds the parameter; one, unless it is tied.
        aliases: names of further linears that hold the same weight.
        shared: names of modules other than linears that hold it too, such as a tied embedding.
    """

    name: str
    owners: list[tuple[nn.Module, str]]
    kind: Kind = "linear"
    aliases: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)

    @property
    def weight(self) -> torch.Tensor:
        """The parameter as it is now: ``[N, K]``, ``[E, N, K]`` of experts, ``[O, I, *kernel]``."""
        module, attribute = self.owners[0]
        return getattr(module, attribute)  # type: ignore[no-any-return]

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as a scheme sees it: that of a convolution as ``[O, I * kernel]``."""
        return self.weight.detach().flatten(1) if self.kind == "convolution" else self.weight

    def rejects(self, scheme: Scheme) -> str | None:
        """Why ``scheme`` can't be applied here, or None."""
        uses = {self.kind} | ({"embedding"} if self.shared else set())
        odd = sorted(uses & {"embedding", "convolution"})
        if odd and not scheme.weight_only:
            return f"{scheme.name} quantizes activations, which the {odd[0]} does not support"
        return scheme.rejects(self.matrix)

    def quantize(self, scheme: Scheme, *, provider: str | None = None) -> QuantizedTensor:
        """The weight, quantized; the layer is left as it is."""
        made = scheme.quantize(self.matrix, provider=provider)
        if self.kind != "convolution":
            return made
        weight = ConvWeight(made, shape=self.weight.shape, dtype=made.dtype, scheme=made.scheme)
        return weight.repacked()


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
    kind: Kind | None
    reason: str


def find_layers(model: nn.Module) -> Layers:
    """Look at every parameter of ``model`` with two dimensions or more.

    Replaceable are the weights of linears, stacks of expert weights ``[E, N, K]``, embeddings and
    convolutions. An embedding that is tied to a linear counts as ``shared`` by that linear. Everything
    else is left alone with a reason: weights of other modules, of ``nn.MultiheadAttention`` (which does
    not call its linears), parametrized ones, and those quantized already. Norms and biases have one
    dimension and are not listed.
    """
    uses = list(_uses(model))
    layers: dict[int, Layer] = {}
    for use in sorted(uses, key=lambda use: use.kind == "embedding"):  # it joins the linear it is tied to
        if use.kind is not None:
            layer = layers.setdefault(id(use.parameter), Layer(use.name, [], use.kind))
            layer.owners.append((use.module, use.attribute))
            if use.name != layer.name:
                (layer.aliases if use.kind == layer.kind else layer.shared).append(use.name)
    left = _parametrized(model)
    for use in uses:
        tied = layers.get(id(use.parameter))
        if use.kind is None:
            left[use.name] = use.reason
            if tied is not None:
                tied.owners.append((use.module, use.attribute))
                tied.shared.append(use.name)
        elif tied is not None and use.name in tied.shared:
            left[use.name] = f"it shares the weight of {tied.name}"
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
                kind, reason = _judge(module, attribute, parameter, attention.get(name))
                yield _Use(layer_name(name, attribute), module, attribute, parameter, kind, reason)


def _judge(
    module: nn.Module, attribute: str, parameter: nn.Parameter, attention: str | None
) -> tuple[Kind | None, str]:
    """What kind of layer this is, or why it is none."""
    name = type(module).__name__
    if isinstance(parameter, QuantizedTensor):
        return None, f"it is quantized already ({parameter.scheme})"
    if attention is not None:
        return None, f"nn.MultiheadAttention {attention!r} uses it without calling a Linear"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None, "its max_norm rewrites rows as they are looked up"
    known: list[tuple[type | tuple[type, ...], Kind]] = [
        (nn.Linear, "linear"),
        (nn.Embedding, "embedding"),
        (_CONVOLUTIONS, "convolution"),
    ]
    for types, kind in known:
        if isinstance(module, types):
            return (kind, "") if attribute == "weight" else (None, f"it is not the weight of its {name}")
    # Position tables and the like have three dimensions too, so that the module's name has to tell.
    if parameter.ndim == 3 and re.search("experts?|moe", name, re.IGNORECASE):
        return "experts", ""
    return None, f"it belongs to {name}, which is no nn.Linear"


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
