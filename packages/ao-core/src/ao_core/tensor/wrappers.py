"""Quantized weights that hold another one: transposed, behind an input scale, or as a convolution's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ao_core.tensor.base import QuantizedTensor

W = TypeVar("W", bound="_Wrapper")


class TransposedWeight(QuantizedTensor):
    """``weight.t()`` of a quantized weight: ``[..., K, N]``, a view that stores nothing of its own."""

    data_names = ("base",)
    base: QuantizedTensor

    def dequantize(self) -> torch.Tensor:
        """The base's values, transposed."""
        return self.base.dequantize().transpose(-2, -1)


class _Wrapper(QuantizedTensor):
    """What is said of the outer tensor, its dtype and layout, is said of the base too."""

    base: QuantizedTensor
    row_data = ("base",)

    def map(
        self: W,
        fn: Callable[[torch.Tensor], torch.Tensor],
        *,
        only: tuple[str, ...] | None = None,
        shape: tuple[int, ...] | torch.Size | None = None,
        dtype: torch.dtype | None = None,
    ) -> W:
        """As the base class; a new dtype is the base's too."""
        made = super().map(fn, only=only, shape=shape, dtype=dtype)
        if dtype is not None and made.base.dtype != dtype:
            made.base = made.base.map(torch.Tensor.detach, dtype=dtype)
        return made

    def portable(self: W) -> W:
        """With a portable base."""
        return self._with(self.base.portable())

    def repacked(self: W) -> W:
        """With a base that is repacked."""
        return self._with(self.base.repacked())

    def _with(self: W, base: QuantizedTensor) -> W:
        if base is self.base:
            return self
        data = [base if name == "base" else getattr(self, name) for name in self.data_names]
        return type(self)(
            *data, shape=self.shape, dtype=self.dtype, scheme=self.scheme, provider=self.provider
        )


class InputScaledTensor(_Wrapper):
    """A weight whose input is scaled first: ``linear(x) = base.linear(x * input_scale)``.

    What SmoothQuant leaves where the scale can't be folded into the layer before.

    Args:
        base: the quantized weight ``[..., N, K]`` of the scaled input.
        input_scale: float ``[K]``.
    """

    data_names = ("base", "input_scale")
    input_scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The weight that the unscaled input meets: ``base * input_scale``."""
        return (self.base.dequantize().float() * self.input_scale.float()).to(self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The base's linear of ``x * input_scale``."""
        return self.base.linear(x * self.input_scale.to(x.dtype), bias)


class ConvWeight(_Wrapper):
    """A convolution's weight ``[O, I, *kernel]`` whose ``base`` is quantized as ``[O, I * kernel]``."""

    data_names = ("base",)

    def dequantize(self) -> torch.Tensor:
        """The base's values in the convolution's shape."""
        return self.base.dequantize().reshape(self.shape)

    def repacked(self) -> ConvWeight:
        """With a portable base: it is only ever dequantized."""
        return self.portable()


WRAPPERS: dict[str, type[QuantizedTensor]] = {kind.__name__: kind for kind in (InputScaledTensor, ConvWeight)}
"""The classes a checkpoint may hold around a scheme's own."""
