"""Folding smoothing factors into what makes a layer's input, where a measurement shows that this is exact.

Names and classes of modules say little about what they compute. So a fold is tried, and kept if every
linear of the block, and the block itself, return what they did before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ao_core.calibrate import Stage, Trace, place, tensors

_TRIES = 3  # linears before a layer that are tried: the last ones called are those that feed it
# How far a channel of a result may be off, in units of the dtype's precision: with factors that are powers
# of two, which round nothing, and with others.
_EXACT, _ROUNDED = 8.0, 256.0

Change = Callable[[nn.Module, torch.Tensor], dict[str, torch.Tensor]]
"""The parameters of a module after its output channels were divided by ``s`` ``[K]``."""


class Folder:
    """Folds factors into the modules of a stage; keeps what the stage did before, to compare with.

    Args:
        stage: where the layers are.
        batch: index of the batch to measure on.
    """

    def __init__(self, stage: Stage, batch: int = 0) -> None:
        self._stage, self._batch = stage, batch
        self._trace = stage.trace(batch)

    def fold(self, names: Sequence[str], s: torch.Tensor) -> str | None:
        """Multiply the columns of layers that read one input by ``s``, and divide what makes that input.

        Args:
            names: linears that read the same input.
            s: factors, float32 ``[K]``.

        Returns:
            Name of the module that took the factors, or None if none can: then nothing was changed.
        """
        consumers = _consumers(self._stage, self._trace, names)
        if consumers is None:
            return None
        for producer, changes in _producers(self._stage, self._trace, names, s.numel()):
            for change in changes:
                if self._keeps(producer, change, consumers, s):
                    return producer.name
        return None

    def _keeps(
        self, producer: _Producer, change: Change, consumers: Sequence[nn.Linear], s: torch.Tensor
    ) -> bool:
        """Apply the change, unless it alters what the stage computes."""
        for factors, slack in ((_probe(s), _EXACT), (s, _ROUNDED)):
            mark = self._stage.mark()
            _apply(self._stage, producer.module, change, consumers, factors)
            after = self._stage.trace(self._batch)
            if not _same(self._trace, after, producer.name, slack):
                self._stage.restore(mark)
                return False
            if factors is not s:
                self._stage.restore(mark)
        self._trace = after
        return True


def divided(module: nn.Module, s: torch.Tensor) -> dict[str, torch.Tensor]:
    """All parameters over ``s``: a norm's weight and bias, a linear's rows and bias."""
    return {
        name: (parameter.float() / s.view(-1, *[1] * (parameter.ndim - 1))).to(parameter.dtype)
        for name, parameter in module.named_parameters(recurse=False)
    }


def divided_offset(module: nn.Module, s: torch.Tensor) -> dict[str, torch.Tensor]:
    """For a norm that multiplies by ``1 + weight``: ``(1 + weight) / s - 1``, and the others over ``s``."""
    (first, weight), *_ = module.named_parameters(recurse=False)
    return {**divided(module, s), first: ((1 + weight.float()) / s - 1).to(weight.dtype)}


@dataclass(frozen=True)
class _Producer:
    name: str
    module: nn.Module


def _consumers(stage: Stage, trace: Trace, names: Sequence[str]) -> list[nn.Linear] | None:
    """All linears that read what ``names`` read; None if one of them can't be scaled."""
    inputs = {place(call.input) for call in trace.calls if call.name in names}
    found = {call.name for call in trace.calls if place(call.input) in inputs}
    modules = [_module(stage, name) for name in found]
    if len(inputs) != 1 or not all(
        isinstance(module, nn.Linear) and stage.owns(module.weight) and _is_plain(module)
        for module in modules
    ):
        return None
    return modules  # type: ignore[return-value]


def _producers(
    stage: Stage, trace: Trace, names: Sequence[str], columns: int
) -> Iterator[tuple[_Producer, tuple[Change, ...]]]:
    """Modules that may make the input: a norm that returned it, then linears of as many outputs."""
    first = next(index for index, call in enumerate(trace.calls) if call.name in names)
    wanted = place(trace.calls[first].input)
    for name, output in trace.outputs.items():
        module = _module(stage, name)
        if place(output) == wanted and _owned(stage, module, columns):
            yield _Producer(name, module), (divided, divided_offset)
    tried = 0
    for call in reversed(trace.calls[:first]):
        module = _module(stage, call.name)
        if tried < _TRIES and _owned(stage, module, columns) and call.name not in names:
            tried += 1
            yield _Producer(call.name, module), (divided,)


def _owned(stage: Stage, module: nn.Module, columns: int) -> bool:
    """Whether all parameters have ``columns`` rows, are in float, and belong to this module alone."""
    own = list(module.parameters(recurse=False))
    return _is_plain(module) and all(stage.owns(each) and each.shape[:1] == (columns,) for each in own)


def _is_plain(module: nn.Module) -> bool:
    return all(type(parameter) is nn.Parameter for parameter in module.parameters(recurse=False))


def _module(stage: Stage, name: str) -> nn.Module:
    inside = name[len(stage.name) :].lstrip(".") if stage.name else name
    return stage.module.get_submodule(inside)


def _probe(s: torch.Tensor) -> torch.Tensor:
    """Powers of two, which change no digit of a product, for each channel another: 1/4 to 4."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-2, 3, s.shape, generator=generator).float().exp2().to(s.device)


def _apply(
    stage: Stage, producer: nn.Module, change: Change, consumers: Sequence[nn.Linear], s: torch.Tensor
) -> None:
    for attribute, value in change(producer, s).items():
        stage.set(producer, attribute, value)
    for module in consumers:
        stage.set(module, "weight", (module.weight.float() * s).to(module.weight.dtype))


def _same(before: Trace, after: Trace, producer: str, slack: float) -> bool:
    """Whether all linears but the one that was divided, and the stage itself, return what they did."""
    if [call.name for call in before.calls] != [call.name for call in after.calls]:
        return False
    old = [call.output for call in before.calls if call.name != producer] + tensors(before.result)
    new = [call.output for call in after.calls if call.name != producer] + tensors(after.result)
    return all(_close(*pair, slack) for pair in zip(old, new, strict=True))


def _close(old: torch.Tensor, new: torch.Tensor, slack: float) -> bool:
    """Whether each channel, over all tokens, is off by no more than ``slack`` roundings."""
    if old.shape != new.shape:
        return False
    if not old.is_floating_point():
        return torch.equal(old, new)
    size = old.shape[-1] if old.ndim else 1
    expected, error = old.float().reshape(-1, size), (new.float() - old.float()).reshape(-1, size)
    limit = slack * torch.finfo(old.dtype).eps
    return bool((error.norm(dim=0) <= limit * expected.norm(dim=0)).all())
