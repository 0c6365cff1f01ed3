"""SmoothQuant (arXiv 2211.10438): move the range of outlying input channels into the weights.

Channel j of a layer's input is divided by s_j and column j of its weight multiplied by it. The product
stays the same, and activations that are quantized with one scale a token lose less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ao_core import BlockAlgorithm, OptionError, Scheme
from ao_core.calibrate import Absmax, Collector, Sample, Stage
from ao_quant.smoothquant_fold import Folder

GRID = tuple(step / 20 for step in range(6, 19))
"""The exponents that ``alpha="auto"`` tries: 0.3 to 0.9."""


def smoothing_factors(x_absmax: torch.Tensor, w_absmax: torch.Tensor, alpha: float) -> torch.Tensor:
    """``s_j = max|X_j|^α / max|W_j|^(1-α)`` (equation 4): float32 ``[K]``, positive and finite.

    Args:
        x_absmax: ``max|X_j|`` of the inputs, float ``[K]``.
        w_absmax: ``max|W_j|`` of the weights' columns, float ``[K]``.
        alpha: how much of the difficulty moves to the weights, 0 to 1.

    A channel that is dead, in the inputs or in the weights, gets 1.
    """
    x, w = x_absmax.double(), w_absmax.double()
    s = (alpha * x.log() - (1 - alpha) * w.log()).exp().float()
    return torch.where((x > 0) & (w > 0) & torch.isfinite(s) & (s > 0), s, torch.ones_like(s))


def column_absmax(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """``max|W_j|`` over weights ``[N_i, K]`` that read the same input: float32 ``[K]``."""
    return torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)


def output_error(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    schemes: Sequence[Scheme],
    s: torch.Tensor | None = None,
) -> float:
    """How far quantized layers, smoothed by ``s`` ``[K]``, are from float ones on inputs ``x`` ``[n, K]``.

    Returns:
        The length of a token's error over the length of its output, both averaged over tokens first;
        the mean over layers.
    """
    if s is not None:
        smoothed = [(weight.float() * s).to(weight.dtype) for weight in weights]
    inputs = x if s is None else (x.float() / s).to(x.dtype)
    errors = []
    for weight, scheme, quantized in zip(weights, schemes, weights if s is None else smoothed, strict=True):
        expected = F.linear(x, weight).float()  # [n, N]
        error = F.linear(inputs, scheme.quantize(quantized)).float() - expected
        # Lengths, not squares: a token with outlying activations would outweigh all others. SmolLM2-135M,
        # int8-dynamic, 16 windows: KL to float 0.0118; 0.0122 by squares, 0.0138 by each token's ratio.
        errors.append(error.norm(dim=1).mean() / expected.norm(dim=1).mean().clamp_min(1e-30))
    return float(torch.stack(errors).mean())


class Inputs(Collector):
    """What smoothing needs to know of a layer's inputs: channel maxima, and some rows to measure on."""

    def __init__(self, columns: int, device: torch.device | str = "cpu", *, rows: int = 512) -> None:
        super().__init__(columns, device)
        self.absmax, self.sample = Absmax(columns, device), Sample(columns, device, limit=rows)

    def add(self, rows: torch.Tensor) -> None:
        """Take in ``rows`` ``[n, K]``."""
        self.absmax.update(rows)
        self.sample.update(rows)

    @property
    def value(self) -> torch.Tensor:
        """``max|X_j|``, float32 ``[K]``."""
        return self.absmax.value


@dataclass(frozen=True)
class SmoothQuant(BlockAlgorithm):
    """Smooth the inputs of layers whose scheme quantizes activations.

    Attributes:
        alpha: the exponent of equation 4, 0 to 1, or ``"auto"``: the one of :data:`GRID` that
            measures best on the whole model, see :meth:`prepared`. It takes a second walk.
        rows: tokens to measure on.
    """

    name: ClassVar[str] = "smoothquant"
    summary: ClassVar[str] = "moves outlying input channels into the weights, for quantized activations"

    alpha: float | str = 0.6
    rows: int = 512

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, (int, float)) and 0 <= self.alpha <= 1
        if self.alpha != "auto" and not number:
            raise OptionError(f"smoothquant takes alpha from 0 to 1, or auto; found {self.alpha!r}.")
        if not isinstance(self.rows, int) or self.rows < 1:
            raise OptionError(f"smoothquant takes rows 1 or more, found {self.rows!r}.")

    def rejects(self, scheme: Scheme | None) -> str | None:
        """Weight-only schemes: the product in float stays what it was, and so would the error."""
        if scheme is None:
            return "it needs a scheme that quantizes activations, such as int8-dynamic"
        if scheme.weight_only:
            return f"{scheme} leaves activations in float; it needs one that does not, such as int8-dynamic"
        return None

    def prepared(self, survey: Callable[[Callable[[Stage], None]], None]) -> SmoothQuant:
        """With ``alpha="auto"``: with the exponent that is found by one walk over the float model.

        It has the least sum of squared :func:`output_error` over all groups of layers with the same input:
        their errors are independent, so their powers add up. Groups that it does not help are left.
        """
        if self.alpha != "auto":
            return self
        powers = torch.zeros(len(GRID), dtype=torch.float64)

        def look(stage: Stage) -> None:
            for group in self._groups(stage):
                unsmoothed = group.error()
                errors = [min(group.error(group.factors(alpha)), unsmoothed) for alpha in GRID]
                powers.add_(torch.tensor(errors, dtype=torch.float64).square())

        survey(look)
        return _Found(GRID[int(powers.argmin())], self.rows)

    def visit(self, stage: Stage) -> None:
        """Smooth each group of layers that read the same input."""
        assert not isinstance(self.alpha, str)
        folder: Folder | None = None
        for group in self._groups(stage):
            folder = folder or Folder(stage)
            s = group.factors(self.alpha)
            before, after = group.error(), group.error(s)
            if self._leaves(before, after):
                facts = {"smoothquant": "smoothing measured no better", "alpha": self.alpha, "error": before}
            else:
                where = folder.fold(group.names, s)
                if where is None:
                    for name in group.names:
                        stage.scale_input(name, 1 / s)
                facts = {
                    "smoothquant": f"folded into {where}" if where else "explicit input scale",
                    "alpha": self.alpha,
                    "error_unsmoothed": before,
                    "error": after,
                }
            for name in group.names:
                stage.note(name, **facts)

    def _leaves(self, before: float, after: float) -> bool:
        """Whether a group stays unsmoothed: never with an exponent that was asked for."""
        return False

    def _groups(self, stage: Stage) -> Iterator[_Group]:
        """The layers to smooth, those with the same input together; notes why others are left out.

        Last first: folding a scale into an earlier linear changes its rows, which is to be known when that
        one is smoothed.
        """
        names = []
        for name, layer in stage.layers.items():
            reason = self.rejects(stage.schemes[name])
            if reason is None and layer.kind != "linear":
                reason = "the experts of a stack share one tensor, and would need a scale each"
            if reason is None:
                names.append(name)
            else:
                stage.note(name, smoothquant=reason)
        if not names:
            return
        inputs = stage.collect(lambda columns, device: Inputs(columns, device, rows=self.rows), names)
        for name in names:
            if not inputs[name][0].tokens:
                stage.note(name, smoothquant="it saw no token, and was not smoothed")
        for group in reversed(stage.groups):
            if members := [name for name in group if name in names and inputs[name][0].tokens]:
                yield _Group(stage, members, inputs[members[0]][0])


class _Found(SmoothQuant):
    """With the exponent that a search found, and only where it helps."""

    def _leaves(self, before: float, after: float) -> bool:
        return after >= before


class _Group:
    """Layers of a stage that read the same input."""

    def __init__(self, stage: Stage, names: Sequence[str], inputs: Inputs) -> None:
        self.names, self.inputs = names, inputs
        self.weights = [stage.weight(name) for name in names]
        self.schemes = [scheme for name in names if (scheme := stage.schemes[name]) is not None]
        self.w_absmax = column_absmax(self.weights)

    def factors(self, alpha: float) -> torch.Tensor:
        """:func:`smoothing_factors`, ``[K]``."""
        return smoothing_factors(self.inputs.absmax.value, self.w_absmax, alpha)

    def error(self, s: torch.Tensor | None = None) -> float:
        """:func:`output_error`, smoothed by ``s`` ``[K]``."""
        return output_error(self.inputs.sample.value, self.weights, self.schemes, s)
