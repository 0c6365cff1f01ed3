"""4-bit weights in groups of columns, with float activations or with int8 ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch

from ao_core import OptionError, QParams, QuantizedTensor, Scheme
from ao_core.numerics import pack
from ao_quant import int4_tiles, ranges
from ao_quant.experts_ops import INT4_EXPERTS_LINEAR
from ao_quant.int4_ops import (
    INT4_WEIGHT_LINEAR,
    INT8_DYNAMIC_INT4_LINEAR,
    dequantize_int4,
    quantize_token,
)
from ao_quant.ranges import Method, ZeroPoint

GROUP_SIZES = (32, 64, 128, 256, -1)


class Int4Tensor(QuantizedTensor):
    """Two codes a byte, ``uint8 [..., N, ceil(K / 2)]``, the even column in the low four bits.

    ``scale`` is ``[..., N, G]``, float32 for a float32 weight, else bfloat16. ``zero`` is None, a midpoint
    of that dtype or a uint8 zero point, of that shape. The last group of a row may be shorter. Every
    device reads this layout.
    """

    data_names = ("packed", "scale", "zero")
    attr_names = ("group_size",)

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group_size: int

    def dequantize(self) -> torch.Tensor:
        """``(q - 8) * scale + zero`` or ``(q - zero) * scale``, float32, cast to the outer dtype."""
        return dequantize_int4(
            self.packed, self.scale, self.zero,
            columns=self.shape[-1], group_size=self.group_size, dtype=self.dtype,
        )  # fmt: skip

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::int4_weight_linear``."""
        out: torch.Tensor = INT4_WEIGHT_LINEAR(
            x, self.packed, self.scale, self.zero, bias, self.group_size, provider=self.provider
        )
        return out

    def grouped_linear(self, x: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::int4_experts_linear``."""
        out: torch.Tensor = INT4_EXPERTS_LINEAR(
            x, offsets, self.packed, self.scale, self.zero, self.group_size, provider=self.provider
        )
        return out

    def repacked(self) -> QuantizedTensor:
        """In torch's own tiles, where its kernel is the best that there is for them."""
        tiling = int4_tiles.tiling_for(self)
        return self if tiling is None else Int4TiledTensor.from_plain(self, tiling)


class Int4TiledTensor(QuantizedTensor):
    """The same weight in the tiles of torch's int4 kernels, for one kind of device.

    ``tiles`` as ``torch._convert_weight_to_int4pack`` (CUDA) or ``..._for_cpu`` makes them, padded to whole
    tiles and groups; ``scale_and_zero`` float ``[G, N, 2]``. Moving, saving, and looking up rows go
    through :class:`Int4Tensor`: tiles are never reinterpreted.
    """

    data_names = ("tiles", "scale_and_zero")
    attr_names = ("group_size", "zero_point", "tiling")
    row_data = ()

    tiles: torch.Tensor
    scale_and_zero: torch.Tensor
    group_size: int
    zero_point: ZeroPoint
    tiling: str

    @classmethod
    def from_plain(cls, weight: Int4Tensor, tiling: str) -> Int4TiledTensor:
        """Tile ``weight`` ``[N, K]`` for the device where it lies."""
        tiles, scale_and_zero = int4_tiles.tile_packed(
            weight.packed, weight.scale, weight.zero, weight.shape[1], weight.group_size, tiling
        )
        kind: ZeroPoint = None
        if weight.zero is not None:
            kind = "float" if weight.zero.is_floating_point() else "integer"
        return cls(
            tiles, scale_and_zero, shape=weight.shape, dtype=weight.dtype, scheme=weight.scheme,
            provider=weight.provider, group_size=weight.group_size, zero_point=kind, tiling=tiling,
        )  # fmt: skip

    def portable(self) -> Int4Tensor:
        """In the layout that every device reads; the codes and parameters are the same."""
        return self._plain(self.tiles, self.scale_and_zero, self.shape[0])

    def _plain(self, tiles: torch.Tensor, scale_and_zero: torch.Tensor, rows: int) -> Int4Tensor:
        shape = (rows, self.shape[1])
        packed, scale, zero = int4_tiles.untile_packed(
            tiles, scale_and_zero, shape, self.group_size, self.zero_point, self.tiling
        )
        return Int4Tensor(
            packed, scale, zero, shape=shape, dtype=self.dtype, scheme=self.scheme,
            provider=self.provider, group_size=self.group_size,
        )  # fmt: skip

    def dequantize(self) -> torch.Tensor:
        """As :class:`Int4Tensor`, from the codes."""
        return self.portable().dequantize()

    def rows(self, index: torch.Tensor) -> QuantizedTensor:
        """Rows ``index`` ``[R]`` in the plain layout; only their tiles are undone."""
        tiles, both, position = int4_tiles.take_rows(self.tiles, self.scale_and_zero, index, self.tiling)
        return self._plain(tiles, both, both.shape[1]).rows(position)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::int4_tiled_linear``."""
        out: torch.Tensor = int4_tiles.INT4_TILED_LINEAR(
            x, self.tiles, self.scale_and_zero, bias,
            self.shape[0], self.group_size, self.zero_point, self.tiling, provider=self.provider,
        )  # fmt: skip
        return out


class Int8DynamicInt4Tensor(Int4Tensor):
    """The same storage; activations are quantized to int8 token by token as they come."""

    grouped_linear = QuantizedTensor.grouped_linear  # the op would leave activations in float

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::int8_dynamic_int4_linear``."""
        out: torch.Tensor = INT8_DYNAMIC_INT4_LINEAR(
            x, self.packed, self.scale, bias, self.group_size, provider=self.provider
        )
        return out

    def repacked(self) -> QuantizedTensor:
        """As it is: torch has no kernel for these activations."""
        return self


class _Int4(Scheme):
    """What the 4-bit schemes share: groups, codes in [0, 15]."""

    rowwise: ClassVar[bool] = True
    group_size: int

    @property
    def group_columns(self) -> int:
        """See :class:`~ao_core.Scheme`."""
        return self.group_size

    def _checked(self) -> None:
        if self.group_size not in GROUP_SIZES or isinstance(self.group_size, bool):
            raise OptionError(
                f"{self.name} takes group_size {', '.join(map(str, GROUP_SIZES))} (-1: the whole row), and "
                f"was given {self.group_size!r}. A group that does not divide the row is fine."
            )

    def _choose(self, weight: torch.Tensor, zero_point: ZeroPoint, method: Method) -> QParams:
        params = ranges.choose(weight, group_size=self.group_size, zero_point=zero_point, method=method)
        return {"scale": params.scale} | ({} if params.zero is None else {"zero": params.zero})

    def encode(self, weight: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """Codes ``uint8 [..., N, C]`` in [0, 15]."""
        return ranges.encode(weight, *self._by_column(qparams, weight.shape[-1])).to(torch.uint8)

    def decode(self, codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """``(q - 8) * scale + zero`` or ``(q - zero) * scale``, float32."""
        return ranges.decode(codes, *self._by_column(qparams, codes.shape[-1]))

    def _by_column(self, qparams: QParams, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return ranges.by_column(qparams["scale"], qparams.get("zero"), columns, self.group_size)


@dataclass(frozen=True)
class Int4WeightOnly(_Int4):
    """4-bit weights in groups, float activations.

    Attributes:
        group_size: columns that share a scale: 32, 64, 128, 256, or -1 for the whole row.
        zero_point: ``"float"``, a midpoint in weight units (tinygemm's convention); ``"integer"``, which
            keeps 0 exact; None, symmetric.
        qparams: how the parameters are found without data: ``"mse"`` (the range with the least squared
            error), ``"minmax"`` (the whole range; quicker) or ``"hqq"`` (half-quadratic; needs the float
            midpoint).
    """

    name: ClassVar[str] = "int4-weight-only"
    version: ClassVar[int] = 1
    tensor_types = (Int4Tensor, Int4TiledTensor)
    min_sqnr: ClassVar[float] = 15.0
    summary: ClassVar[str] = "4-bit weights in groups; float activations"

    group_size: int = 128
    zero_point: ZeroPoint = "float"
    qparams: Method = "mse"

    def __post_init__(self) -> None:
        self._checked()
        for option, known in (("zero_point", ("float", "integer", None)), ("qparams", get_args(Method))):
            if (given := getattr(self, option)) not in known:
                names = ", ".join(map(str, known))
                raise OptionError(f"{self.name} takes {option} {names}, and was given {given!r}.")
        if self.qparams == "hqq" and self.zero_point != "float":
            raise OptionError(
                f"qparams=hqq solves for a float midpoint, and zero_point={self.zero_point} was asked for. "
                "Use zero_point=float, or qparams=mse."
            )

    def choose_qparams(self, weight: torch.Tensor) -> QParams:
        """``scale`` and, unless symmetric, ``zero``, each ``[..., N, G]``."""
        return self._choose(weight, self.zero_point, self.qparams)

    def pack(self, codes: torch.Tensor, qparams: QParams, *, dtype: torch.dtype) -> Int4Tensor:
        """Two codes a byte; the parameters as they are."""
        return Int4Tensor(
            pack.pack(codes, bits=4), qparams["scale"], qparams.get("zero"),
            shape=codes.shape, dtype=dtype, group_size=self.group_size,
        )  # fmt: skip


@dataclass(frozen=True)
class Int8DynamicInt4Weight(_Int4):
    """Symmetric 4-bit weights in groups; int8 activations, asymmetric, one scale a token (8da4w).

    Attributes:
        group_size: columns that share a scale: 32, 64, 128, 256, or -1 for the whole row.
        qparams: ``"mse"`` or ``"minmax"``: see :class:`Int4WeightOnly`.
    """

    name: ClassVar[str] = "int8-dynamic-int4-weight"
    version: ClassVar[int] = 1
    tensor_types = (Int8DynamicInt4Tensor,)
    min_sqnr: ClassVar[float] = 15.0
    min_linear_sqnr: ClassVar[float] = 36.0
    summary: ClassVar[str] = "4-bit weights in groups; int8 activations, one scale a token (8da4w)"

    group_size: int = 32
    qparams: Method = "mse"

    def __post_init__(self) -> None:
        self._checked()
        if self.qparams not in ("minmax", "mse"):
            raise OptionError(f"{self.name} takes qparams minmax, mse, and was given {self.qparams!r}.")

    def choose_qparams(self, weight: torch.Tensor) -> QParams:
        """``scale`` ``[..., N, G]``."""
        return self._choose(weight, None, self.qparams)

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """``(codes - zero) * scale`` of each token, float32."""
        shifted, scale = quantize_token(x)
        return shifted.float() * scale

    def pack(self, codes: torch.Tensor, qparams: QParams, *, dtype: torch.dtype) -> Int8DynamicInt4Tensor:
        """Two codes a byte; the scales as they are."""
        return Int8DynamicInt4Tensor(
            pack.pack(codes, bits=4), qparams["scale"], None,
            shape=codes.shape, dtype=dtype, group_size=self.group_size,
        )  # fmt: skip
