"""The batches of each stage: captured in front of the blocks, and handed from block to block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ao_core.calibrate.batches import call, mapped, padding_mask, tensors
from ao_core.calibrate.blocks import Blocks, Chain
from ao_core.calibrate.placement import Placement

_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")


class WholeInputs:
    """Batches of the whole model."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], device: torch.device) -> None:
        self._model, self._batches, self._device = model, batches, device
        self.masks = [padding_mask(batch) for batch in batches]

    def __len__(self) -> int:
        return len(self._batches)

    def run(self, index: int) -> Any:
        """Run the model on batch ``index``."""
        return call(self._model, self._batches[index], self._device)

    def mask(self, index: int) -> torch.Tensor | None:
        """See :class:`ao_core.calibrate.stage.Inputs`."""
        return self.masks[index]


@dataclass
class Stream:
    """What flows through the blocks: for each batch the hidden states, and each block's other arguments.

    Attributes:
        hidden: what the next block takes, ``[b, t, K]`` as a rule; one list for all blocks.
        others: for each block and batch its arguments without the hidden states.
        masks: for each batch the positions that are no padding, or None.
    """

    chain: Chain
    hidden: list[torch.Tensor] = field(default_factory=list)
    others: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    masks: list[torch.Tensor | None] = field(default_factory=list)

    def advance(self, inputs: BlockInputs) -> None:
        """Replace the hidden states by what a block makes of them."""
        for index in range(len(self.hidden)):
            output = inputs.run(index)
            self.hidden[index] = output if self.chain.outputs is None else output[0]


class BlockInputs:
    """Batches of one block."""

    def __init__(self, block: nn.Module, stream: Stream, number: int) -> None:
        self._block, self._stream, self._others = block, stream, stream.others[number]

    def __len__(self) -> int:
        return len(self._stream.hidden)

    def advance(self) -> None:
        """Let the stream hold what the block makes of it."""
        self._stream.advance(self)

    def run(self, index: int) -> Any:
        """Run the block on batch ``index``."""
        args, kwargs = self._others[index]
        hidden = self._stream.hidden[index].clone()  # blocks may change it in place
        slot = self._stream.chain.slot
        if isinstance(slot, str):
            return self._block(*args, **kwargs, **{slot: hidden})
        return self._block(*args[:slot], hidden, *args[slot:], **kwargs)

    def mask(self, index: int) -> torch.Tensor | None:
        """See :class:`ao_core.calibrate.stage.Inputs`."""
        return self._stream.masks[index]


class RestInputs(WholeInputs):
    """Batches of what lies before and after the blocks: these are stepped over."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], device: torch.device, blocks: Blocks, stream: Stream
    ) -> None:
        super().__init__(model, batches, device)
        self._blocks, self._stream = blocks, stream

    def run(self, index: int) -> Any:
        """What the first block would be given, and what the model makes of the last block's result."""
        given: list[torch.Tensor] = []

        def stand_in(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            slot = self._stream.chain.slot
            given.append(kwargs[slot] if isinstance(slot, str) else args[slot])
            last = number == len(self._blocks.modules) - 1
            return _shaped(self._stream.hidden[index] if last else given[0], self._stream.chain)

        with replaced(self._blocks, stand_in):
            result = super().run(index)
        return given[0], result


def capture(
    model: nn.Module, blocks: Blocks, chain: Chain, batches: Sequence[Any], placement: Placement
) -> Stream:
    """Run ``model`` up to its blocks on every batch and keep what they are given. No block is run."""
    stream = Stream(chain, others=[[] for _ in blocks.modules])
    for batch in batches:
        stream.masks.append(padding_mask(batch))
        _capture_one(model, blocks, stream, batch, placement)
    return stream


class _Enough(Exception):
    """The last block was reached."""


def _capture_one(model: nn.Module, blocks: Blocks, stream: Stream, batch: Any, placement: Placement) -> None:
    slot = stream.chain.slot
    first = [others[0] for others in stream.others if others]
    compared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def stand_in(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {name: None if name in _CACHES else value for name, value in kwargs.items()}
        if isinstance(slot, str):
            hidden = kwargs.pop(slot)
        else:
            hidden, args = args[slot], (*args[:slot], *args[slot + 1 :])
        if number == 0:
            stream.hidden.append(hidden.detach())
        stream.others[number].append(_shared((args, kwargs), first[number] if first else None, compared))
        if number == len(blocks.modules) - 1:
            raise _Enough
        return _shaped(hidden, stream.chain)

    try:
        with replaced(blocks, stand_in):
            call(model, batch, placement.device)
    except _Enough:
        pass


@contextmanager
def replaced(
    blocks: Blocks, stand_in: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """Inside the block, ``stand_in(number, args, kwargs)`` is called instead of each block."""
    with ExitStack() as undo:
        for number, block in enumerate(blocks.modules.values()):
            undo.callback(_put_back, block, vars(block).get("forward"))

            def forward(*args: Any, number: int = number, **kwargs: Any) -> Any:
                return stand_in(number, args, kwargs)

            block.forward = forward
        yield


def _put_back(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward


def _shaped(hidden: torch.Tensor, chain: Chain) -> Any:
    """``hidden`` in the form of a block's result."""
    return hidden if chain.outputs is None else (hidden, *[None] * (chain.outputs - 1))


def _shared(given: Any, earlier: Any, compared: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """``given`` with tensors that equal those of an earlier batch replaced by them: masks, positions.

    ``compared``: id → tensor and what replaces it, of those that another block was given too.
    """
    known = iter(tensors(earlier))

    def same(tensor: torch.Tensor) -> torch.Tensor:
        other = next(known, None)
        if id(tensor) not in compared:
            alike = other is not None and other.shape == tensor.shape and other.dtype == tensor.dtype
            equal = alike and torch.equal(other, tensor)  # type: ignore[arg-type]
            compared[id(tensor)] = tensor, other if other is not None and equal else tensor.detach()
        return compared[id(tensor)][1]

    return mapped(given, same)
