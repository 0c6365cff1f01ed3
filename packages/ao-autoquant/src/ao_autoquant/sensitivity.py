"""What an error in one layer costs the model: nats that its predictions move, for each row of logits.

``"loss"`` estimates it from gradients. With labels drawn from the model's own predictions, the gradient ``g``
of a layer's output tells to second order how far an error ``Δy`` moves the predictions:
``KL ≈ ½ E (g · Δy)²`` over all rows of a sequence (the Fisher, or Gauss-Newton, approximation: Martens, "New
insights and perspectives on the natural gradient method", 2014). A few backward passes serve all candidates
of a layer.

The rows of one sequence can't be taken as independent: attention adds up what the values of many tokens have
in common, and row by row the estimate was a fifth to two thirds of the truth for ``v_proj`` of SmolLM2. A sum
over whole sequences is a single sample of a wide distribution. So stretches of ``SEGMENT`` rows are summed.

A few dozen stretches are still few: for one weight their sums scatter by a quarter, and a search among
thousands of candidates finds those that came out too small. Of a linear layer a sum is ``ΔW · G``,
``G = Σ g xᵀ``, and rounding errors have nothing to do with each other, so that its square is ``Σ ΔW² G²`` on
average: an average over a million products. That is what counts with fewer than ``FEW`` stretches; what
quantized activations add is taken from sums as before.

``"kl"`` exchanges the layer's weight and runs the model: nothing is approximated, at a forward pass for each
layer and candidate.

Both add up over layers, as far as the errors of different layers are independent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import nn

from ao_autoquant.exchange import exchanged
from ao_autoquant.gradients import DRAWS, Pair, gradients, is_linear, segments, squares_of, stretches
from ao_autoquant.logits import divergence, predictions, rows_that_count
from ao_autoquant.measure import Digests, digest
from ao_autoquant.profile import Seen
from ao_core import Layer, OptionError, QuantizedTensor
from ao_core.calibrate import tensors

Measure = Literal["output", "loss", "kl"]
ROWS = {"loss": 2048, "kl": 512}
"""Rows of logits that are looked at, at most, unless the first batch alone has more."""
FEW = 256
"""Stretches; so many sums for a weight's own errors scatter by less than a tenth, and count themselves."""
_ROUNDING = 0.05  # of an output's error: what is left beside the weight's, of float32 sums alone
_HELD_BYTES = 1 << 30  # of inputs and gradients at once; further layers take a pass of their own


def checked_measure(text: str) -> Measure:
    """``text`` if it names a measure of errors.

    Raises:
        OptionError: it does not.
    """
    for known in get_args(Measure):
        if text == known:
            found: Measure = known
            return found
    raise OptionError(f"error is measured as {', '.join(get_args(Measure))}, and {text!r} was given.")


class Sensitivity(Protocol):
    """Nats for each row of logits that one changed layer costs."""

    @property
    def key(self) -> Mapping[str, Any]:
        """What the numbers depend on, beside layer and scheme."""

    def increase(self, name: str, weight: torch.Tensor) -> float:
        """Of layer ``name`` with ``weight``, quantized, instead of its own."""


def sensitivity(
    measure: Measure, model: nn.Module, seen: Mapping[str, Seen], batches: Sequence[Any], source: str
) -> FromGradients | Divergence | None:
    """The :class:`Sensitivity` that ``measure`` names, or None for ``"output"``; ``source``: see there."""
    if measure == "output":
        return None
    if measure == "loss":
        return FromGradients(model, seen, batches, source)
    return Divergence(model, seen, batches, source)


def model_digest(model: nn.Module, digests: Digests | None = None) -> str:
    """A short text that changes with the model's class and values, the same on every device."""
    found = hashlib.sha256(type(model).__qualname__.encode())
    digests = digests or Digests()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        found.update(f"{name} {tensor.dtype} {digests(tensor)}".encode())
    return found.hexdigest()[:24]


def source_of(
    model: nn.Module,
    measure: Measure,
    examples: Sequence[Any],
    batches: Sequence[Any],
    digests: Digests | None = None,
) -> str:
    """A short text that changes with all that errors depend on, the same on every device."""
    parts = (
        measure,
        model_digest(model, digests),
        batches_digest(examples if measure == "output" else batches),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def batches_digest(batches: Sequence[Any]) -> str:
    """A short text that changes with the tensors of ``batches``."""
    every = [f"{tuple(each.shape)} {digest(each)}" for batch in batches for each in tensors(batch)]
    return hashlib.sha256(repr(every).encode()).hexdigest()[:24]


@dataclass(eq=False)
class FromGradients:
    """``½ Σ (Σ g · Δy)²`` over stretches of rows of a layer's output, for each row of logits; see the module.

    Args:
        model: any whose output holds logits; unchanged.
        seen: the layers, in the order in which they are asked for.
        batches: inputs of the model.
        source: changes with the model and the batches, see :func:`source_of`.
    """

    model: nn.Module
    seen: Mapping[str, Seen]
    batches: Sequence[Any]
    source: str = ""
    _held: dict[str, list[Pair]] = field(default_factory=dict)
    _own: tuple[str, Sequence[torch.Tensor]] = ("", ())
    _expected: tuple[str, torch.Tensor | None] = ("", None)

    @property
    def key(self) -> Mapping[str, Any]:
        """See :class:`Sensitivity`."""
        return {"what": "loss", "estimate": 3, "source": self.source, "rows": ROWS["loss"]}

    @cached_property
    def _bounded(self) -> list[tuple[Any, int]]:
        return bounded(self.model, self.batches, ROWS["loss"])

    @property
    def _rows(self) -> int:
        return sum(rows for _, rows in self._bounded)

    def increase(self, name: str, weight: torch.Tensor) -> float:
        """See :class:`Sensitivity`."""
        if name not in self._held:
            self._held = {}  # before the next are made
            batches = [batch for batch, _ in self._bounded]
            self._held = gradients(self.model, self._next(name), batches)
        layer, parts = self.seen[name].layer, [torch.zeros((), dtype=torch.float64)]
        change = None
        squares = self._squares(name)
        if squares is not None and isinstance(weight, QuantizedTensor):
            change = weight.dequantize().float() - layer.weight.detach().float()
            parts.append((change.square() * squares).sum().double())
        for pair, own in zip(self._held[name], self._outputs(name), strict=True):
            with torch.no_grad(), exchanged([(layer, weight)]):
                off = pair.call().float() - own.float()  # [..., t, N]
            if change is not None:
                size = off.norm()
                off -= F.linear(pair.call.args[0].float(), change)
                if off.norm() <= _ROUNDING * size:  # the activations were left alone, here as in every call
                    break
            for g in pair.gradients:
                rows = (g.float() * off).sum(-1).double()  # [..., t]
                parts.append(segments(rows, pair.segment).square().sum() / DRAWS)
        total = float(torch.stack([part.to(parts[-1].device) for part in parts]).sum())  # read once
        return 0.5 * total / self._rows

    def _squares(self, name: str) -> torch.Tensor | None:
        """``Σ G²`` of a linear layer, float32 ``[N, K]``, if there are few stretches; made once."""
        if self._expected[0] != name:
            pairs, found = self._held[name], None
            if pairs and all(map(is_linear, pairs)) and sum(map(stretches, pairs)) < FEW:
                every = (
                    squares_of(pair.call.args[0], g, pair.segment) for pair in pairs for g in pair.gradients
                )
                found = sum(every, torch.zeros(())) / DRAWS
            self._expected = name, found
        return self._expected[1]

    def _outputs(self, name: str) -> Sequence[torch.Tensor]:
        """Of the layer's calls with its own weight, made once for all its candidates."""
        if self._own[0] != name:
            with torch.no_grad():
                self._own = name, [pair.call() for pair in self._held[name]]
        return self._own[1]

    def _next(self, name: str) -> dict[str, Layer]:
        """``name`` and the layers after it, as many as may be held at once."""
        names = list(self.seen)
        found: dict[str, Layer] = {}
        room = _HELD_BYTES
        for each in names[names.index(name) :]:
            weight = self.seen[each].layer.weight
            room -= (weight.shape[-1] + DRAWS * weight.shape[-2]) * self._rows * weight.element_size()
            if found and room < 0:
                break
            found[each] = self.seen[each].layer
        return found


@dataclass(eq=False)
class Divergence:
    """``KL(float ‖ changed)`` of the predictions, with one layer's weight exchanged.

    Args:
        model: any whose output holds logits; unchanged.
        seen: the layers.
        batches: inputs of the model.
        source: changes with the model and the batches, see :func:`source_of`.
    """

    model: nn.Module
    seen: Mapping[str, Seen]
    batches: Sequence[Any]
    source: str = ""

    @property
    def key(self) -> Mapping[str, Any]:
        """See :class:`Sensitivity`."""
        return {"what": "kl", "source": self.source, "rows": ROWS["kl"]}

    @cached_property
    def _reference(self) -> list[tuple[Any, torch.Tensor]]:
        """Batches, and what the model as it is predicts for them."""
        found = bounded(self.model, self.batches, ROWS["kl"])
        return [(batch, self._predicted(batch)) for batch, _ in found]

    def increase(self, name: str, weight: torch.Tensor) -> float:
        """See :class:`Sensitivity`."""
        reference = self._reference  # before anything is exchanged
        with exchanged([(self.seen[name].layer, weight)]):
            total = sum(divergence(logits, self._predicted(batch)) for batch, logits in reference)
        return total / sum(len(logits) for _, logits in reference)

    def _predicted(self, batch: Any) -> torch.Tensor:
        return rows_that_count(batch, predictions(self.model, batch))


def bounded(model: nn.Module, batches: Sequence[Any], rows: int) -> list[tuple[Any, int]]:
    """The first batches, up to ``rows`` rows of logits but at least one, each with its number of rows."""
    taken: list[tuple[Any, int]] = []
    for batch in batches:
        found = len(rows_that_count(batch, predictions(model, batch)))
        if taken and found > rows:
            break
        taken.append((batch, found))
        rows -= found
    return taken
