"""The walk: one block after the other, each on what the compressed blocks before it give."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ao_core.calibrate.blocks import Blocks, Chain, NoBlocks, find_blocks, find_chain
from ao_core.calibrate.inputs import BlockInputs, RestInputs, WholeInputs, capture
from ao_core.calibrate.placement import Journal, Placement
from ao_core.calibrate.stage import Inputs, Stage
from ao_core.layers import Layer
from ao_core.progress import reporting
from ao_core.scheme import Scheme

logger = logging.getLogger(__name__)
Visit = Callable[[Stage], None]


@dataclass(frozen=True)
class Walk:
    """How a model was walked.

    Attributes:
        how: in words: which blocks, or why the whole model was taken at once.
        notes: layer → what algorithms say about it, and ``tokens``: how many of its inputs they looked at.
    """

    how: str
    notes: dict[str, dict[str, Any]]


class Walker:
    """Walks a model and lets ``visit`` change each stage; keeps what is needed to undo it.

    Args:
        model: on one device, or with ``device`` None on several.
        layers: what is to be compressed, from :func:`ao_core.layers.find_layers`.
        schemes: layer → scheme, or None to leave that to the algorithms.
        batches: from :func:`ao_core.calibrate.batches.as_batches`.
        device: where blocks run. If the model lies elsewhere, one block at a time is brought there,
            together with the activations of all batches.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        schemes: Mapping[str, Scheme | None],
        batches: Sequence[Any],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.model, self.layers, self.schemes, self.batches = model, layers, schemes, batches
        self.placement = Placement(model, device)
        self.journal = Journal()
        self._owners = _owners(model)
        self._notes: dict[str, dict[str, Any]] = {}

    def walk(self, visit: Visit, *, progress: bool = False) -> Walk:
        """Call ``visit`` for each stage. If anything raises, the model is as it was."""
        self._notes = {}
        with torch.no_grad(), _evaluating(self.model), reporting("calibrating", enabled=progress) as show:
            try:
                how = self._walk(visit, show)
            except BaseException:
                self.restore()
                raise
        return Walk(how, dict(sorted(self._notes.items())))

    def restore(self) -> None:
        """Put back every parameter that was exchanged."""
        self.journal.restore()
        self.placement.settle(self.model)

    def _walk(self, visit: Visit, show: Callable[[int, int], None]) -> str:
        try:
            blocks = find_blocks(self.model)
            with self.placement.brought(_outside(self.model, blocks)):
                chain = find_chain(self.model, blocks, self.batches[0], self.placement)
        except NoBlocks as reason:
            how = f"the whole model at once: {reason}"
            logger.info("calibrating %s", how)
            show(0, 1)
            with self.placement.brought(self.model.modules()):
                inputs = WholeInputs(self.model, self.batches, self.placement.device)
                self._visit(visit, "", self.model, list(self.layers), inputs)
            return how
        return self._walk_blocks(visit, blocks, chain, show)

    def _walk_blocks(
        self, visit: Visit, blocks: Blocks, chain: Chain, show: Callable[[int, int], None]
    ) -> str:
        outside = _outside(self.model, blocks)
        with self.placement.brought(outside):
            stream = capture(self.model, blocks, chain, self.batches, self.placement)
        inside = {name: self._inside(name) for name in blocks.modules}
        rest = sorted(set(self.layers) - {layer for names in inside.values() for layer in names})
        for number, (name, block) in enumerate(blocks.modules.items()):
            show(number, len(blocks.modules) + bool(rest))
            inputs = BlockInputs(block, stream, number)
            with self.placement.brought(block.modules()):
                self._visit(visit, name, block, inside[name], inputs)
                stream.advance(inputs)
            stream.others[number].clear()
        if rest:
            with self.placement.brought(outside):
                last = RestInputs(self.model, self.batches, self.placement.device, blocks, stream)
                self._visit(visit, "", self.model, rest, last)
        return f"{len(blocks.modules)} blocks of {blocks.name or type(self.model).__name__} in turn" + (
            f", then {len(rest)} layers outside them" if rest else ""
        )

    def _visit(
        self, visit: Visit, name: str, module: nn.Module, layers: Sequence[str], inputs: Inputs
    ) -> None:
        stage = Stage(
            name,
            module,
            {layer: self.layers[layer] for layer in layers},
            {layer: self.schemes.get(layer) for layer in layers},
            inputs,
            self.journal,
            self._owners,
        )
        if layers:
            visit(stage)
        self._notes |= stage.notes
        self.journal.settle(self.placement.home if self.placement.moves else None)

    def _inside(self, block: str) -> list[str]:
        """Layers all of whose owners lie in ``block``."""
        return [
            name
            for name, layer in self.layers.items()
            if all(
                f"{owner}.".startswith(f"{block}.")
                for module, attribute in layer.owners
                for owner in self._owners[id(module._parameters[attribute])]
            )
        ]


def _outside(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    inside = {id(part) for block in blocks.modules.values() for part in block.modules()}
    return [module for module in model.modules() if id(module) not in inside]


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Parameter → the names of all modules that hold it, a module under two names counted twice."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(name)
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, without the fused attention blocks of torch, which call none of their linears."""
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training
