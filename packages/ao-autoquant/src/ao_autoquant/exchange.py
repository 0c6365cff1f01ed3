"""Other weights in a model for a while, and its own again afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ao_core import Layer


@contextmanager
def restoring(layers: Iterable[Layer]) -> Iterator[None]:
    """What the block puts into ``layers`` is taken out again if it raises, Ctrl-C included."""
    before = _held(layers)
    try:
        yield
    except BaseException:
        _put_back(before)
        raise


@contextmanager
def exchanged(weights: Iterable[tuple[Layer, torch.Tensor]]) -> Iterator[None]:
    """Each layer with another weight inside; afterwards, whatever happens, with the very one it had."""
    pairs = list(weights)
    before = _held(layer for layer, _ in pairs)
    try:
        for layer, weight in pairs:
            parameter = nn.Parameter(weight, requires_grad=False)
            for module, attribute in layer.owners:
                module._parameters[attribute] = parameter
        yield
    finally:
        _put_back(before)


_Held = list[tuple[nn.Module, str, "nn.Parameter | None"]]


def _held(layers: Iterable[Layer]) -> _Held:
    owners = [owner for layer in layers for owner in layer.owners]
    return [(module, attribute, module._parameters[attribute]) for module, attribute in owners]


def _put_back(before: _Held) -> None:
    for module, attribute, parameter in before:
        module._parameters[attribute] = parameter
