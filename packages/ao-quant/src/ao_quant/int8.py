"""int8 weights: one scale for each output channel, or for each group of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ao_core import OptionError, QParams, QuantizedTensor, Scheme
from ao_core.numerics import affine
from ao_quant.experts_ops import INT8_EXPERTS_LINEAR
from ao_quant.int8_ops import INT8_DYNAMIC_LINEAR, INT8_WEIGHT_LINEAR

QMIN, QMAX = -128, 127


class Int8Tensor(QuantizedTensor):
    """Codes ``int8 [..., N, K]`` and scales ``float32 [..., N, G]``; activations stay in float."""

    data_names = ("codes", "scale")
    attr_names = ("group_size",)

    codes: torch.Tensor
    scale: torch.Tensor
    group_size: int

    def dequantize(self) -> torch.Tensor:
        """``codes * scale`` in float32, cast to the outer dtype."""
        return affine.dequantize(self.codes, self.scale, group_size=self.group_size, dtype=self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::int8_weight_linear``."""
        out: torch.Tensor = INT8_WEIGHT_LINEAR(
            x, self.codes, self.scale, bias, self.group_size, provider=self.provider
        )
        return out

    def grouped_linear(self, x: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::int8_experts_linear``."""
        out: torch.Tensor = INT8_EXPERTS_LINEAR(
            x, offsets, self.codes, self.scale, self.group_size, provider=self.provider
        )
        return out


class Int8DynamicTensor(Int8Tensor):
    """The same storage; activations are quantized to int8 token by token as they come."""

    grouped_linear = QuantizedTensor.grouped_linear  # the op would leave activations in float

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::int8_dynamic_linear``."""
        out: torch.Tensor = INT8_DYNAMIC_LINEAR(x, self.codes, self.scale, bias, provider=self.provider)
        return out


class _Int8(Scheme):
    """What both int8 schemes share: ``scale = absmax / 127.5``, codes in [-128, 127]."""

    group_size: int

    @property
    def group_columns(self) -> int:
        """See :class:`~ao_core.Scheme`."""
        return self.group_size

    def choose_qparams(self, weight: torch.Tensor) -> QParams:
        """``scale`` ``[..., N, G]``, float32.

        For a bfloat16 weight it is rounded to bfloat16 first, so that kernels that take the scale in
        the activation's dtype use the value that the codes were made with.
        """
        scale = affine.choose_symmetric(weight, qmin=QMIN, qmax=QMAX, group_size=self.group_size)
        if weight.dtype == torch.bfloat16:
            scale = scale.bfloat16().float()
        return {"scale": scale}

    def encode(self, weight: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """Codes ``int8 [..., N, C]``."""
        return affine.quantize(weight, qparams["scale"], qmin=QMIN, qmax=QMAX, group_size=self.group_size)

    def decode(self, codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """``codes * scale``, float32."""
        return affine.dequantize(codes, qparams["scale"], group_size=self.group_size)


@dataclass(frozen=True)
class Int8WeightOnly(_Int8):
    """int8 weights, float activations.

    Attributes:
        group_size: columns that share a scale; -1 for the whole row.
    """

    name: ClassVar[str] = "int8-weight-only"
    version: ClassVar[int] = 1
    tensor_types = (Int8Tensor,)
    min_sqnr: ClassVar[float] = 40.0
    summary: ClassVar[str] = "int8 weights, one scale a row (or group); float activations"

    group_size: int = -1

    def __post_init__(self) -> None:
        if not isinstance(self.group_size, int) or (self.group_size < 1 and self.group_size != -1):
            raise OptionError(
                f"{self.name} takes group_size 1 or more, or -1 for the whole row, "
                f"and was given {self.group_size!r}."
            )

    def pack(
        self,
        codes: torch.Tensor,
        qparams: QParams,
        *,
        dtype: torch.dtype,
    ) -> Int8Tensor:
        """Stored as they are, ``int8 [..., N, K]``."""
        return Int8Tensor(codes, qparams["scale"], shape=codes.shape, dtype=dtype, group_size=self.group_size)


@dataclass(frozen=True)
class Int8Dynamic(_Int8):
    """int8 weights and int8 activations, one scale for each token, found when it comes.

    Integer products are summed exactly in int32; scales are applied in float32 before the one cast to
    the activation's dtype.
    """

    name: ClassVar[str] = "int8-dynamic"
    version: ClassVar[int] = 1
    tensor_types = (Int8DynamicTensor,)
    min_sqnr: ClassVar[float] = 40.0
    min_linear_sqnr: ClassVar[float] = 38.0
    summary: ClassVar[str] = "int8 weights, one scale a row; int8 activations, one scale a token"

    @property
    def group_size(self) -> int:  # type: ignore[override]
        """Always the whole row: int32 sums can't be rescaled within it."""
        return -1

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """``codes * scale`` of each token, float32."""
        codes, scale = affine.quantize_per_token(x)
        return codes.float() * scale

    def pack(
        self,
        codes: torch.Tensor,
        qparams: QParams,
        *,
        dtype: torch.dtype,
    ) -> Int8DynamicTensor:
        """Stored as they are, ``int8 [..., N, K]``."""
        return Int8DynamicTensor(codes, qparams["scale"], shape=codes.shape, dtype=dtype, group_size=-1)
