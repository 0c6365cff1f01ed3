"""Finding the repeated blocks of a model, and by running it, how they are chained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ao_core.calibrate.batches import call, tensors
from ao_core.calibrate.placement import Placement
from ao_core.layers import find_layers

_RIVAL = 0.25  # of the weights of the largest stack: what a second stack may hold before it counts


class NoBlocks(Exception):
    """Why a model can't be walked block by block."""


@dataclass(frozen=True)
class Blocks:
    """Modules of one class that are called one after another.

    Attributes:
        name: of their list.
        modules: by qualified name, in order.
    """

    name: str
    modules: dict[str, nn.Module]


@dataclass(frozen=True)
class Chain:
    """How a block hands on its result.

    Attributes:
        slot: position or name of the argument that takes the result of the block before.
        outputs: None if a block returns a tensor, else how many values its tuple has; the first is
            handed on.
    """

    slot: int | str
    outputs: int | None


def find_blocks(model: nn.Module) -> Blocks:
    """The list of same-class modules that holds most linear weights.

    Raises:
        NoBlocks: there is none, or another one beside it holds a quarter as much or more.
    """
    sizes = {
        name: layer.weight.numel()
        for name, layer in find_layers(model).replaceable.items()
        if layer.kind in ("linear", "experts")
    }
    held: dict[str, int] = {}
    for name, module in model.named_modules():
        if _repeats(module):
            held[name] = sum(size for layer, size in sizes.items() if f"{layer}.".startswith(_inside(name)))
    best = max(held, key=lambda name: held[name], default=None)
    if best is None or not held[best]:
        raise NoBlocks(f"{type(model).__name__} has no list of repeated blocks")
    rivals = [
        name
        for name, size in held.items()
        if size >= _RIVAL * held[best]
        and not _inside(name).startswith(_inside(best))
        and not _inside(best).startswith(_inside(name))
    ]
    if rivals:
        raise NoBlocks(
            f"{type(model).__name__} has more than one stack of blocks: {', '.join([best, *rivals])}"
        )
    children = model.get_submodule(best).named_children()
    return Blocks(best, {f"{_inside(best)}{name}": module for name, module in children})


def find_chain(model: nn.Module, blocks: Blocks, batch: Any, placement: Placement) -> Chain:
    """Run ``model`` on ``batch`` and watch its blocks.

    Raises:
        NoBlocks: they are not called once each in order, each on what the one before returned and on
            nothing else that a block made.
    """
    watch = _Watch(list(blocks.modules))
    modules = list(blocks.modules.values())
    # How blocks are called does not depend on their values: one block's weights on the device do for all.
    lender = modules[0] if placement.moves and not _share_tensors(modules) else None
    with ExitStack() as stack:
        if lender is not None:
            stack.enter_context(placement.brought(lender.modules()))
        for index, block in enumerate(modules):
            if block is not lender:
                stack.enter_context(_on_device(block, placement, lender))
            stack.callback(block.register_forward_pre_hook(watch.before(index), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(watch.after(index)).remove)
        call(model, batch, placement.device)
    return watch.chain()


class _Watch:
    """Hooks that record how blocks are called, without keeping more than one block's result."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._order: list[int] = []
        self._last: tuple[torch.Tensor, int] | None = None  # a block's result, and its version
        self._others: list[torch.Tensor] = []  # what else blocks returned
        self._first: set[int | str] = set()  # the arguments of the first block
        self._slots: set[int | str] = set()
        self._outputs: set[int | None] = set()
        self._reason = ""

    def before(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._order.append(index)
            given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            if any(
                tensor is other for tensor in tensors([value for _, value in given]) for other in self._others
            ):
                self._refuse(f"{self._names[index]} takes more than the result of the block before it")
            if index == 0:
                self._first = {key for key, _ in given}
            if self._last is not None:
                result, version = self._last
                slots = [key for key, value in given if value is result]
                if not slots or result._version != version:
                    self._refuse(f"{self._names[index]} does not take what the block before it returned")
                self._slots |= set(slots[:1])

        return hook

    def after(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first, *others = output if isinstance(output, tuple) else (output,)
            self._outputs.add(len(output) if isinstance(output, tuple) else None)
            self._others += tensors(others)
            if isinstance(first, torch.Tensor):
                self._last = (first, first._version)
            else:
                self._refuse(f"{self._names[index]} returns a {type(output).__name__} and no tensor")

        return hook

    def _refuse(self, reason: str) -> None:
        self._reason = self._reason or reason

    def chain(self) -> Chain:
        if self._order != list(range(len(self._names))):
            raise NoBlocks(f"{self._names[0]} to {self._names[-1]} are not called once each, in order")
        if self._reason or len(self._slots) != 1 or len(self._outputs) != 1 or not self._slots <= self._first:
            raise NoBlocks(self._reason or "its blocks take or return values in different ways")
        return Chain(self._slots.pop(), self._outputs.pop())


@contextmanager
def _on_device(block: nn.Module, placement: Placement, lender: nn.Module | None) -> Iterator[None]:
    """Bring ``block`` to the device for each of its calls, or let it have the weights of ``lender`` there."""
    with ExitStack() as held, ExitStack() as hooks:

        def enter(*_: Any) -> None:
            brought = placement.brought(block.modules()) if lender is None else placement.lent(lender, block)
            held.enter_context(brought)

        hooks.callback(block.register_forward_pre_hook(enter).remove)
        hooks.callback(block.register_forward_hook(lambda *_: held.close()).remove)
        yield


def _share_tensors(modules: Sequence[nn.Module]) -> bool:
    """Whether a tensor belongs to more than one of ``modules``."""
    own = [{id(tensor) for tensor in (*each.parameters(), *each.buffers())} for each in modules]
    return len(set().union(*own)) < sum(map(len, own))


def _repeats(module: nn.Module) -> bool:
    """Whether it is a list of two or more modules of one class that have parts."""
    children = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
    return len(children) > 1 and len({type(c) for c in children}) == 1 and any(children[0].children())


def _inside(name: str) -> str:
    return f"{name}." if name else ""
