"""Weights that are measured by running the module that holds them: stacks of experts, embeddings.

What such a module does with its weights is its own affair, so that its whole forward runs on inputs that it
saw: with its own weights, and with one of them quantized. The difference is that weight's.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ao_autoquant.exchange import exchanged
from ao_autoquant.measure import Digests, FaultError, Quality, Time, comparable, digest, relative_error
from ao_core import Layer, stored_bytes
from ao_core.calibrate import tensors

if TYPE_CHECKING:
    from ao_autoquant.profile import Seen

_ROUND_S = 0.02
_REPEATS = 5


@dataclass(frozen=True)
class Call:
    """One call of a module: positional and keyword arguments."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self) -> torch.Tensor:
        """The module's output, without its hooks.

        Raises:
            FaultError: it is no tensor.
        """
        found = self.module.forward(*self.args, **self.kwargs)
        if not isinstance(found, torch.Tensor):
            raise FaultError(f"its module returns {type(found).__name__}, and no tensor to compare")
        return found


def module_quality(
    layer: Layer, weight: torch.Tensor, calls: list[Call], exact: list[torch.Tensor]
) -> Quality:
    """Compare the outputs of all ``calls`` with ``weight`` in the layer to ``exact``: those with its own.

    Raises:
        FaultError: the outputs have another shape or dtype, or hold NaN or infinity.
    """
    with exchanged([(layer, weight)]):
        found = [comparable(call(), own) for call, own in zip(calls, exact, strict=True)]
    flat = [torch.cat([each.flatten() for each in outputs]) for outputs in (exact, found)]
    return Quality(relative_error(*flat), stored_bytes(weight))


def module_time(layer: Layer, weight: torch.Tensor, call: Call) -> Time:
    """Microseconds of ``call`` with ``weight`` in the layer, as the host sees them, the device idle before.

    A module may wait for its device, such as to read which experts are needed, so that no graph is recorded:
    on a GPU launching counts.
    """
    with exchanged([(layer, weight)]), torch.no_grad():
        once = _seconds(call, weight.device, 1)
        rounds = max(1, int(_ROUND_S / max(once, 1e-7)))
        times = sorted(1e6 * _seconds(call, weight.device, rounds) / rounds for _ in range(_REPEATS))
    return Time(statistics.median(times), (times[-2] - times[1]) / 2)


def module_values(seen: Seen, digests: Digests) -> dict[str, str]:
    """What the error depends on, as texts: the module's values and its inputs."""
    calls = list(seen.inputs.values())
    state = calls[0].module.state_dict(keep_vars=True).items()
    values = [f"{name} {digests(tensor)}" for name, tensor in state]
    inputs = [digest(each) for call in calls for each in tensors((call.args, call.kwargs))]
    return {"weight": digests(seen.layer.weight), "sample": _short((values, inputs))}


def module_shape(seen: Seen) -> str:
    """What time depends on beside the weight and the call: the module's class, and its weights' shapes."""
    module = next(iter(seen.inputs.values())).module
    state = [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]
    return f"{type(module).__qualname__} {_short((seen.layer.owners[0][1], state))}"


def call_shape(call: Call) -> list[list[int]]:
    """The shapes of a call's tensors."""
    return [list(each.shape) for each in tensors((call.args, call.kwargs))]


def _short(data: object) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()[:24]


def _seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    if rounds == 1:
        call()  # what is compiled or chosen when first run does not count
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
