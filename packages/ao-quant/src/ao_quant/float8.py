"""float8 weights (e4m3: largest 448, three bits after the point) with one scale a row, or one for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from ao_core import OptionError, QParams, QuantizedTensor, Scheme
from ao_quant.experts_ops import FLOAT8_EXPERTS_LINEAR
from ao_quant.float8_ops import (
    FLOAT8,
    FLOAT8_DYNAMIC_LINEAR,
    FLOAT8_WEIGHT_LINEAR,
    LARGEST,
    SMALLEST_ABSMAX,
    quantize_float8,
)

Granularity = Literal["row", "tensor"]


class Float8Tensor(QuantizedTensor):
    """Codes ``float8_e4m3fn [..., N, K]``; activations stay in float.

    ``scale`` is float32: ``[..., N, 1]``, or ``[1, 1]`` where all of the weight shares one.
    """

    data_names = ("codes", "scale")
    attr_names = ("granularity",)

    codes: torch.Tensor
    scale: torch.Tensor
    granularity: Granularity

    @property
    def row_data(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """A scale that all rows share is not cut."""
        return ("codes",) if self.granularity == "tensor" else None

    def dequantize(self) -> torch.Tensor:
        """``codes * scale`` in float32, cast to the outer dtype."""
        return (self.codes.float() * self.scale).to(self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::float8_weight_linear``."""
        out: torch.Tensor = FLOAT8_WEIGHT_LINEAR(x, self.codes, self.scale, bias, provider=self.provider)
        return out

    def grouped_linear(self, x: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::float8_experts_linear``."""
        out: torch.Tensor = FLOAT8_EXPERTS_LINEAR(x, offsets, self.codes, self.scale, provider=self.provider)
        return out


class Float8DynamicTensor(Float8Tensor):
    """The same storage; activations are scaled and rounded to float8 as they come."""

    grouped_linear = QuantizedTensor.grouped_linear  # the op would leave activations in float

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::float8_dynamic_linear``."""
        out: torch.Tensor = FLOAT8_DYNAMIC_LINEAR(
            x, self.codes, self.scale, bias, self.granularity == "row", provider=self.provider
        )
        return out


class _Float8(Scheme):
    """What both float8 schemes share: ``scale = absmax / 448``, in float32."""

    granularity: Granularity

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise OptionError(
                f"{self.name} takes granularity 'row' or 'tensor', and was given {self.granularity!r}."
            )

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        """Whether rows have their own scales."""
        return self.granularity == "row"

    def choose_qparams(self, weight: torch.Tensor) -> QParams:
        """``scale`` float32 ``[..., N, 1]``; its values are all the same with one scale for all."""
        absmax = torch.maximum(weight.amax(-1, keepdim=True), -weight.amin(-1, keepdim=True))
        if self.granularity == "tensor":
            absmax = absmax.amax().expand(absmax.shape)
        return {"scale": absmax.float().clamp_min(SMALLEST_ABSMAX) / LARGEST}

    def encode(self, weight: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """The bits of the nearest float8, uint8 ``[..., N, C]``; beyond the largest it is that."""
        scaled = (weight.float() / qparams["scale"]).clamp_(-LARGEST, LARGEST)
        return scaled.to(FLOAT8).view(torch.uint8)

    def decode(self, codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """``codes * scale``, float32."""
        return codes.view(FLOAT8).float() * qparams["scale"]

    def pack(self, codes: torch.Tensor, qparams: QParams, *, dtype: torch.dtype) -> Float8Tensor:
        """Stored as they are, and one scale where all are the same.

        Raises:
            ValueError: scales that differ, with one scale for all.
        """
        scale = qparams["scale"]
        if self.granularity == "tensor":
            low, high = scale.aminmax()
            if low != high:
                raise ValueError(
                    f"{self} stores one scale, and was given some from {float(low)} to {float(high)}; "
                    "use granularity='row'."
                )
            scale = low.view(1, 1)
        kind: type[Float8Tensor] = self.tensor_types[0]  # type: ignore[assignment]
        bits = codes.view(FLOAT8)
        return kind(bits, scale, shape=codes.shape, dtype=dtype, granularity=self.granularity)


@dataclass(frozen=True)
class Float8WeightOnly(_Float8):
    """float8 weights, float activations.

    Attributes:
        granularity: ``"row"`` for one scale a row, ``"tensor"`` for one.
    """

    name: ClassVar[str] = "float8-weight-only"
    version: ClassVar[int] = 1
    tensor_types = (Float8Tensor,)
    min_sqnr: ClassVar[float] = 31.0
    summary: ClassVar[str] = "float8 weights, one scale a row (or one); float activations"

    granularity: Granularity = "row"


@dataclass(frozen=True)
class Float8Dynamic(_Float8):
    """float8 weights and float8 activations, whose scales are found when they come.

    Attributes:
        granularity: ``"row"`` for one scale a row of the weight and one a token, ``"tensor"`` for one each:
            a token's result then depends on the tokens beside it.
    """

    name: ClassVar[str] = "float8-dynamic"
    version: ClassVar[int] = 1
    tensor_types = (Float8DynamicTensor,)
    min_sqnr: ClassVar[float] = 31.0
    min_linear_sqnr: ClassVar[float] = 30.0
    summary: ClassVar[str] = "float8 weights, one scale a row (or one); float8 activations, one scale a token"

    granularity: Granularity = "row"

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """``codes * scale``, float32."""
        codes, scale = quantize_float8(x, rowwise=self.granularity == "row")
        return codes.float() * scale
