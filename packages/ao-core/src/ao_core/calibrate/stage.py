"""What an algorithm is handed: one block, its layers, and a way to run it on all calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from ao_core.calibrate import processes
from ao_core.calibrate.collectors import Collector, PairedHessian
from ao_core.calibrate.observer import Observer
from ao_core.calibrate.placement import Journal
from ao_core.calibrate.trace import Trace, follow, follow_all, place
from ao_core.errors import ModelError, RejectedError
from ao_core.layers import Layer
from ao_core.numerics.hessian import finite
from ao_core.scheme import Scheme
from ao_core.tensor import InputScaledTensor, QuantizedTensor

C = TypeVar("C", bound=Collector)


class Inputs(Protocol):
    """The batches of a stage."""

    def __len__(self) -> int: ...

    def run(self, index: int) -> Any:
        """Run the stage's module on batch ``index``."""

    def mask(self, index: int) -> torch.Tensor | None:
        """Positions ``[b, t]`` that hold tokens, or None for all."""


class Stage:
    """One step of a walk: a block with the inputs that the compressed blocks before it give.

    Weights are changed through it, never in place, so that they can be put back.

    Attributes:
        name: of the block, such as ``"model.layers.3"``; empty where the whole model is the stage.
        module: the block, or the model.
        schemes: layer → the scheme that the plan gives it, or None.
        providers: layer → the kernel provider that the plan pins, where it does.
        notes: layer → what algorithms have to say about it, JSON-able.
        shared: whether each process looks at its own share of the batches: what they collect is then joined.
        reference: the batches as the float model has them here, where an algorithm asked for them.
        said: called with a layer and facts about it as they are noted.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        layers: Mapping[str, Layer],
        schemes: Mapping[str, Scheme | None],
        inputs: Inputs,
        journal: Journal,
        owners: Mapping[int, Sequence[str]],
    ) -> None:
        self.name, self.module, self.schemes = name, module, schemes
        self.providers: Mapping[str, str | None] = {}
        self.shared = False
        self.reference: Inputs | None = None
        self.said: Callable[[str, Mapping[str, Any]], None] = lambda name, facts: None
        self.notes: dict[str, dict[str, Any]] = {name: {} for name in layers}
        self._layers, self._inputs, self._journal, self._owners = layers, inputs, journal, owners
        self._scales: dict[str, torch.Tensor] = {}
        self._zeros: dict[str, torch.Tensor] = {}
        self._floats: dict[str, nn.Parameter] = {}

    @property
    def layers(self) -> dict[str, Layer]:
        """Linears and expert stacks that no algorithm has quantized yet, by name."""
        return {
            name: layer
            for name, layer in self._layers.items()
            if layer.kind in ("linear", "experts") and not isinstance(layer.weight, QuantizedTensor)
        }

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._inputs)

    @cached_property
    def groups(self) -> list[tuple[str, ...]]:
        """Layers that read the same input, such as q, k and v, in the order of their first call.

        Found by running batches until every layer was called; layers that no batch calls are left out.
        """
        weights = {name: layer.weight for name, layer in self.layers.items()}
        found: dict[str, tuple[str, ...]] = {}
        for index in range(self.batches):
            inputs: dict[Any, list[str]] = {}
            trace = follow(partial(self.run, index), weights)
            for call in trace.calls:
                if call.name not in found and call.input.numel():
                    key = place(call.input) if self._layers[call.name].kind == "linear" else call.name
                    inputs.setdefault(key, []).append(call.name)
            for names in inputs.values():
                found |= dict.fromkeys(names, tuple(dict.fromkeys(names)))
            if len(found) == len(weights):
                break
        if self.shared:  # all must agree, also about layers that only some have seen
            found = {
                name: tuple(group)
                for each in reversed(processes.gathered(found))
                for name, group in each.items()
            }
        return list(dict.fromkeys(found.values()))

    def run(self, index: int) -> Any:
        """Run the stage as it is now on batch ``index``; returns what its module returns."""
        return self._inputs.run(index)

    def trace(self, index: int = 0) -> Trace:
        """Run batch ``index`` and keep the inputs and outputs of its linears and norms."""
        return follow_all(partial(self.run, index), self.module, self.name)

    def collect(
        self,
        make: Callable[[int, torch.device], C],
        names: Iterable[str] | None = None,
        *,
        floats: bool = False,
    ) -> dict[str, list[C]]:
        """Run all batches and collect what the layers see, as the stage is now.

        Args:
            make: a collector's class, or any function of (columns, device) that makes one.
            names: layers; by default all of :attr:`layers`.
            floats: run the batches as the float model has them here, see :attr:`reference`.

        Returns:
            For each layer a collector for each of its matrices: one, or E of an expert stack. Layers
            that read the same input share theirs. A layer that was never called has seen 0 tokens.

        Raises:
            ModelError: a layer saw NaN or infinity.
        """
        found, leaders = self._made(make, names)
        weights = {name: self._layers[name].weight for name in found}
        inputs = (self.reference if floats else None) or self._inputs
        for index in range(self.batches):
            with Observer(weights, partial(self._update, found, inputs.mask(index))):
                inputs.run(index)
        return self._collected(found, leaders)

    def collect_pairs(
        self,
        names: Iterable[str] | None = None,
        seen: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> dict[str, list[PairedHessian]]:
        """:meth:`collect` Hessians, and what each input lacks of that in the float model.

        The float model's inputs come from :attr:`reference`; without it, from the stage's own batches and
        float weights. Inputs are paired by the order of a layer's calls; those of experts, which the two
        may route differently, are not paired, nor is padding. ``seen`` is what becomes of an input before it
        is multiplied; that of the float model stays as it is.
        """
        found, leaders = self._made(partial(PairedHessian, seen=seen), names)
        weights = {name: self._layers[name].weight for name in found}
        floats = self.reference or self._inputs
        for index in range(self.batches):
            mask = self._inputs.mask(index)
            wanted: dict[str, list[torch.Tensor]] = {name: [] for name in found}
            with self.unquantized():
                originals = {name: self._layers[name].weight for name in found}
                with Observer(originals, lambda name, _, x, out: wanted[name].append(x.detach())):  # noqa: B023
                    floats.run(index)
            with Observer(weights, partial(self._pair, found, mask, wanted)):
                self.run(index)
        return self._collected(found, leaders)

    @contextmanager
    def unquantized(self) -> Iterator[None]:
        """Inside the block, layers that were quantized in this stage have their float weights again."""
        held = {name: cast("nn.Parameter", self._layers[name].weight) for name in self._floats}
        try:
            self._exchange(self._floats)
            yield
        finally:
            self._exchange(held)

    def weight(self, name: str) -> torch.Tensor:
        """The float weight of a layer that its (possibly scaled) input meets, ``[..., N, K]``."""
        weight, scale = self._layers[name].weight.detach(), self._scales.get(name)
        return weight if scale is None else (weight.float() / scale).to(weight.dtype)

    def replace(self, name: str, weight: torch.Tensor) -> None:
        """Give a layer another :meth:`weight`: quantized, which finishes it, or float."""
        layer, scale = self._layers[name], self._scales.get(name)
        self._check_zeros(name, weight)
        if scale is not None and isinstance(weight, QuantizedTensor):
            weight = _input_scaled(weight, scale)
        elif scale is not None:
            weight = (weight.float() * scale).to(weight.dtype)
        trains = layer.weight.requires_grad and not isinstance(weight, QuantizedTensor)
        parameter = nn.Parameter(weight, requires_grad=trains)
        if isinstance(weight, QuantizedTensor):
            self._floats[name] = cast("nn.Parameter", layer.weight)
        for module, attribute in layer.owners:
            self._journal.exchange(module, attribute, parameter)

    def fix_zeros(self, name: str, zeros: torch.Tensor) -> None:
        """Let the weights of a layer that are pruned stay zero, whatever else is done to it.

        Args:
            name: of the layer, whose weight is zero there already.
            zeros: bool ``[..., N, K]``, True where a weight is pruned.
        """
        self._zeros[name] = zeros

    def zeros(self, name: str) -> torch.Tensor | None:
        """Where an algorithm has fixed weights of a layer at zero: bool ``[..., N, K]``, or None."""
        return self._zeros.get(name)

    def scale_input(self, name: str, scale: torch.Tensor) -> None:
        """Let a layer's input be multiplied by ``scale`` ``[K]`` (positive), and its weight be divided.

        Its float output stays as it is. Collectors then see the scaled input, :meth:`weight` is the
        divided weight, and :meth:`replace` stores the scale with a quantized weight.
        """
        before = self._scales.get(name)
        self._scales[name] = scale if before is None else before * scale

    def set(self, module: nn.Module, attribute: str, value: torch.Tensor) -> None:
        """Replace another parameter inside the stage, such as a norm's weight or a bias."""
        old = cast("nn.Parameter", module._parameters[attribute])
        self._journal.exchange(module, attribute, nn.Parameter(value, requires_grad=old.requires_grad))

    def owns(self, parameter: torch.Tensor) -> bool:
        """Whether one module of this stage, and nothing else in the model, holds ``parameter``."""
        names = self._owners.get(id(parameter))
        if names is None:  # it was set during this walk, through its one owner
            return True
        return len(names) == 1 and (not self.name or f"{names[0]}.".startswith(f"{self.name}."))

    def mark(self) -> int:
        """A point that :meth:`restore` can go back to, to try a change."""
        return self._journal.mark()

    def restore(self, mark: int) -> None:
        """Undo every :meth:`replace` and :meth:`set` since ``mark``."""
        self._journal.restore(mark)

    def note(self, name: str, **facts: Any) -> None:
        """Add JSON-able facts about a layer to the report."""
        self.notes[name] |= facts
        self.said(name, facts)

    def finish(self) -> None:
        """Quantize what is still in float with the plan's scheme, where it has one."""
        for name, layer in self._layers.items():
            if name in self._zeros:
                self.note(name, sparsity=_share(self._zeros[name]))
            scheme, provider = self.schemes[name], self.providers.get(name)
            if scheme is None or isinstance(layer.weight, QuantizedTensor):
                continue
            try:
                if layer.kind in ("linear", "experts"):
                    self.replace(name, scheme.quantize(self.weight(name), provider=provider))
                else:
                    self.replace(name, layer.quantize(scheme, provider=provider))
            except RejectedError as error:
                raise RejectedError(f"layer {name!r}: {error} The model was not changed.") from error

    def _check_zeros(self, name: str, weight: torch.Tensor) -> None:
        """Raise RejectedError if pruned weights would come back."""
        zeros = self._zeros.get(name)
        if zeros is None:
            return
        values = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        if back := int(values.masked_select(zeros).count_nonzero()):
            raise RejectedError(
                f"{back} of its {int(zeros.sum())} pruned weights are not zero any more in {name!r} "
                f"({getattr(weight, 'scheme', 'float')}). Use a scheme that stores 0 exactly, such as "
                "int4-weight-only or int8-weight-only."
            )

    def _made(
        self, make: Callable[[int, torch.device], C], names: Iterable[str] | None
    ) -> tuple[dict[str, list[C]], dict[str, str]]:
        """Collectors of the layers that others share theirs with, and for each layer which that is."""
        wanted = list(self.layers if names is None else names)
        leaders = {name: self._leader(name, wanted) for name in wanted}
        weights = {name: self._layers[name].weight for name in dict.fromkeys(leaders.values())}
        found = {
            name: [make(weight.shape[-1], weight.device) for _ in matrices(weight)]
            for name, weight in weights.items()
        }
        return found, leaders

    def _collected(self, found: dict[str, list[C]], leaders: dict[str, str]) -> dict[str, list[C]]:
        """Join what the processes saw, refuse what is not finite, note the tokens."""
        for collectors in found.values():
            for each in collectors:
                if self.shared:
                    each.join()
        for name, leader in leaders.items():
            if not all(finite(each.value) for each in found[leader]):
                raise ModelError(
                    f"layer {name!r} saw NaN or infinity on the calibration data. Look for overflow in "
                    "the model's dtype, or for damaged weights."
                )
            self.note(name, **_tokens(found[leader]))
        return {name: found[leader] for name, leader in leaders.items()}

    def _update(
        self,
        found: Mapping[str, Sequence[Collector]],
        mask: torch.Tensor | None,
        name: str,
        index: int,
        x: torch.Tensor,
        out: Any,
    ) -> None:
        found[name][index].update(self._rows(name, x, mask))

    def _pair(
        self,
        found: Mapping[str, Sequence[PairedHessian]],
        mask: torch.Tensor | None,
        wanted: Mapping[str, list[torch.Tensor]],
        name: str,
        index: int,
        x: torch.Tensor,
        out: Any,
    ) -> None:
        waiting = wanted[name]
        if len(found[name]) == 1 and waiting and waiting[0].shape == x.shape:
            reference = waiting.pop(0)
            found[name][index].pair(self._rows(name, x, mask), self._rows(name, reference, mask))
        else:
            found[name][index].update(self._rows(name, x, mask))

    def _rows(self, name: str, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Inputs of a layer as its :meth:`weight` meets them, without padding."""
        rows, scale = _unpadded(x, mask), self._scales.get(name)
        return rows if scale is None else rows * scale.to(rows.dtype)

    def _exchange(self, weights: Mapping[str, nn.Parameter]) -> None:
        for name, weight in weights.items():
            for module, attribute in self._layers[name].owners:
                module._parameters[attribute] = weight

    def _leader(self, name: str, wanted: Sequence[str]) -> str:
        """The layer whose collectors ``name`` shares: the first of its group that is scaled as it is."""
        group = next((group for group in self.groups if name in group), (name,))
        mine = self._scales.get(name)
        for other in group:
            theirs = self._scales.get(other)
            both = mine is not None and theirs is not None and torch.equal(mine, theirs)
            if other in wanted and (mine is theirs or both):
                return other
        return name


def matrices(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The matrices ``[N, K]`` of a weight ``[..., N, K]``: itself, or one for each expert."""
    return weight.reshape(-1, *weight.shape[-2:]).unbind(0)


def _share(zeros: torch.Tensor) -> float:
    return float(zeros.sum()) / zeros.numel()


def _input_scaled(weight: QuantizedTensor, scale: torch.Tensor) -> InputScaledTensor:
    return InputScaledTensor(
        weight,
        scale,
        shape=weight.shape,
        dtype=weight.dtype,
        scheme=weight.scheme,
        provider=weight.provider,
    )


def _tokens(collectors: Sequence[Collector]) -> dict[str, Any]:
    """How many tokens a layer saw; of a stack also the experts that saw none."""
    facts: dict[str, Any] = {"tokens": sum(each.tokens for each in collectors)}
    if len(collectors) > 1:
        facts["experts_without_tokens"] = [i for i, each in enumerate(collectors) if not each.tokens]
    return facts


def _unpadded(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``x`` ``[..., K]`` without the positions that are padding, where its shape tells which they are."""
    if mask is None:
        return x
    if x.shape[:-1] == mask.shape:
        return x[mask.to(x.device)]
    if x.ndim == 2 and x.shape[0] == mask.numel():
        return x[mask.flatten().to(x.device)]
    return x
