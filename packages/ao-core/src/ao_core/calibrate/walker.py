"""The walk: one block after the other, each on what the compressed blocks before it give."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ao_core.calibrate import processes
from ao_core.calibrate.blocks import Blocks, NoBlocks, find_blocks, find_chain
from ao_core.calibrate.inputs import BlockInputs, RestInputs, Stream, WholeInputs, capture
from ao_core.calibrate.placement import Journal, Placement
from ao_core.calibrate.resume import Resume
from ao_core.calibrate.stage import Inputs, Stage
from ao_core.causal import evaluating
from ao_core.layers import Layer
from ao_core.progress import reporting
from ao_core.scheme import Scheme
from ao_core.tensor import QuantizedTensor

logger = logging.getLogger(__name__)
Visit = Callable[[Stage], None]
Show = Callable[..., None]  # done, total, and what to say


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
        shared: the batches are this process's share; see :class:`Stage`.
        reference: hand on the float model's hidden states too, for :attr:`Stage.reference`.
        resume: finished stages are kept there, and read from there.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        schemes: Mapping[str, Scheme | None],
        batches: Sequence[Any],
        *,
        device: torch.device | str | None = None,
        shared: bool = False,
        reference: bool = False,
        resume: Resume | None = None,
    ) -> None:
        self.model, self.layers, self.schemes, self.batches = model, layers, schemes, batches
        self.shared, self.reference, self.resume = shared, reference, resume
        self._finished = 0
        self.placement = Placement(model, device)
        self.journal = Journal()
        self._owners = _owners(model)
        self._notes: dict[str, dict[str, Any]] = {}

    def walk(self, visit: Visit, *, progress: bool = False, resuming: bool = True) -> Walk:
        """Call ``visit`` for each stage. If anything raises, the model is as it was.

        Args:
            visit: changes a stage.
            progress: show how far it is; of several processes the first one does.
            resuming: use :attr:`resume`, where there is one.
        """
        self._notes = {}
        self._resume = self.resume if resuming else None
        self._finished = 0 if self._resume is None else self._resume.done()
        said = progress and processes.rank() == 0
        with torch.no_grad(), _evaluating(self.model), reporting("calibrating", enabled=said) as show:
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

    def _walk(self, visit: Visit, show: Show) -> str:
        try:
            blocks = find_blocks(self.model)
            with self.placement.brought(_outside(self.model, blocks)):
                chain = find_chain(self.model, blocks, self.batches[0], self.placement)
                stream = capture(self.model, blocks, chain, self.batches, self.placement)
        except NoBlocks as reason:
            how = f"the whole model at once: {reason}"
            logger.info("calibrating %s", how)
            show(0, 1)
            with self.placement.brought(self.model.modules()):
                inputs = WholeInputs(self.model, self.batches, self.placement.device)
                self._visit(visit, 0, "", self.model, list(self.layers), inputs, partial(show, 0, 1))
            return how
        return self._walk_blocks(visit, blocks, stream, show)

    def _walk_blocks(self, visit: Visit, blocks: Blocks, stream: Stream, show: Show) -> str:
        outside = _outside(self.model, blocks)
        floats = replace(stream, hidden=list(stream.hidden)) if self.reference else None
        inside = {name: self._inside(name) for name in blocks.modules}
        rest = sorted(set(self.layers) - {layer for names in inside.values() for layer in names})
        total = len(blocks.modules) + bool(rest)
        following = [*blocks.modules.values()][1:]
        for number, (name, block) in enumerate(blocks.modules.items()):
            show(number, total)
            inputs = BlockInputs(block, stream, number)
            reference = None if floats is None else BlockInputs(block, floats, number)
            with self.placement.brought(block.modules()):
                said = partial(show, number, total)
                self._visit(visit, number, name, block, inside[name], inputs, said, reference)
                if number < len(following):  # not earlier: its weights would lie beside this one's Hessians
                    self.placement.fetch(following[number].modules())
                stream.advance(inputs)
            stream.others[number].clear()
        if rest:
            show(total - 1, total)
            with self.placement.brought(outside):
                last = RestInputs(self.model, self.batches, self.placement.device, blocks, stream)
                floating = None
                if floats is not None:
                    device = self.placement.device
                    floating = RestInputs(self.model, self.batches, device, blocks, floats)
                said = partial(show, total - 1, total)
                self._visit(visit, total - 1, "", self.model, rest, last, said, floating)
        return f"{len(blocks.modules)} blocks of {blocks.name or type(self.model).__name__} in turn" + (
            f", then {len(rest)} layers outside them" if rest else ""
        )

    def _visit(
        self,
        visit: Visit,
        number: int,
        name: str,
        module: nn.Module,
        layers: Sequence[str],
        inputs: Inputs,
        said: Callable[[str], None],
        reference: Inputs | None = None,
    ) -> None:
        before = dict(self.model.named_parameters(remove_duplicate=False)) if layers else {}
        if number < self._finished and self._resume is not None:
            self._put(*self._resume.load(number, self.placement.device))
        elif layers:
            stage = Stage(
                name,
                module,
                {layer: self.layers[layer] for layer in layers},
                {layer: self.schemes.get(layer) for layer in layers},
                inputs,
                self.journal,
                self._owners,
            )
            stage.shared, stage.reference = self.shared, reference
            stage.said = lambda layer, facts: said(_loss(layer, facts)) if "error" in facts else None
            visit(stage)
            self._notes |= stage.notes
            self._keep(number, before, stage.notes)
            said(_losses(name, stage.notes), whole=True)  # type: ignore[call-arg]
        elif self._resume is not None:
            self._keep(number, before, {})
        if isinstance(reference, BlockInputs):
            with self._as_before(before):
                reference.advance()
        self.journal.settle(self.placement)

    def _keep(
        self, number: int, before: Mapping[str, nn.Parameter], notes: Mapping[str, Mapping[str, Any]]
    ) -> None:
        if self._resume is not None:
            now = dict(self.model.named_parameters(remove_duplicate=False))
            changed = {name: value for name, value in now.items() if before and value is not before[name]}
            self._resume.store(number, changed, notes)

    def _put(self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, dict[str, Any]]) -> None:
        """Let the model have what an earlier run found for a stage."""
        made: dict[int, nn.Parameter] = {}
        for name, tensor in tensors.items():
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            old = cast("nn.Parameter", module._parameters[attribute])
            trains = old.requires_grad and not isinstance(tensor, QuantizedTensor)
            parameter = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=trains))
            self.journal.exchange(module, attribute, parameter)
        self._notes |= notes

    @contextmanager
    def _as_before(self, before: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Inside the block, the parameters ``before``."""
        now = dict(self.model.named_parameters(remove_duplicate=False))
        changed = [name for name in before if now[name] is not before[name]]
        try:
            self._exchange({name: before[name] for name in changed})
            yield
        finally:
            self._exchange({name: now[name] for name in changed})

    def _exchange(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            owner, _, attribute = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[attribute] = parameter

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


def _loss(layer: str, facts: Mapping[str, Any]) -> str:
    """A layer's loss in words, where an algorithm measured it."""
    rounded = f" (rounded {facts['error_rounded']:.2e})" if "error_rounded" in facts else ""
    return f"{layer}: error {facts['error']:.2e}{rounded}"


def _losses(stage: str, notes: Mapping[str, Mapping[str, Any]]) -> str:
    """The losses of a stage's layers in a line."""
    inside = len(stage) + 1 if stage else 0
    said = [_loss(layer[inside:], facts) for layer, facts in notes.items() if "error" in facts]
    return f"{stage or 'the model'}: {', '.join(said)}" if said else ""


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
    fast = torch.backends.mha.get_fastpath_enabled()
    with evaluating(model):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
