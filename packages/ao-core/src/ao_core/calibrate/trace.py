"""What one batch does inside a block: who multiplies what, and which module made it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ao_core.calibrate.observer import Observer
from ao_core.layers import layer_name


@dataclass(frozen=True)
class Call:
    """One multiplication by a layer's weight: ``input`` ``[..., K]``, ``output`` ``[..., N]``."""

    name: str
    input: torch.Tensor
    output: torch.Tensor


@dataclass
class Trace:
    """What one batch did inside a stage.

    Attributes:
        calls: of every linear in the stage, also those that are not to be compressed, in order.
        outputs: of every module whose own parameters are vectors, such as norms: name → tensor.
        result: what the stage returned.
    """

    calls: list[Call] = field(default_factory=list)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    result: Any = None


def follow(run: Callable[[], Any], weights: Mapping[str, torch.Tensor]) -> Trace:
    """Call ``run`` and keep each multiplication by one of ``weights``.

    The tensors stay alive with the trace, so that no address stands for two of them.
    """
    trace = Trace()

    def seen(name: str, index: int, x: torch.Tensor, out: torch.Tensor) -> None:
        trace.calls.append(Call(name, x.detach(), out.detach()))

    with Observer(weights, seen):
        trace.result = run()
    return trace


def follow_all(run: Callable[[], Any], module: nn.Module, prefix: str) -> Trace:
    """:func:`follow` every ``nn.Linear`` inside ``module``, and keep what its norms return."""
    outputs: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    handles = []

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs[name] = output.detach()

        return hook

    for name, part in module.named_modules(prefix=prefix):
        own = list(part.parameters(recurse=False))
        if isinstance(part, nn.Linear):
            weights[layer_name(name, "weight")] = part.weight
        elif own and all(parameter.ndim == 1 for parameter in own):
            handles.append(part.register_forward_hook(keep(name)))
    try:
        trace = follow(run, weights)
    finally:
        for handle in handles:
            handle.remove()
    trace.outputs = outputs
    return trace


def place(tensor: torch.Tensor) -> tuple[int, int]:
    """What two tensors that are the same numbers in the same memory have in common."""
    return tensor.data_ptr(), tensor.numel()
