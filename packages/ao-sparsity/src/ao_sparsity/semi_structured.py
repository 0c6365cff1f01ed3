"""2:4 weights that are stored as such: schemes ``semi-sparse`` and ``semi-sparse-int8-dynamic``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from ao_core import QParams, QuantizedTensor, RejectedError, Scheme
from ao_core.numerics import affine
from ao_sparsity.linear import SEMI_SPARSE_INT8_LINEAR, SEMI_SPARSE_LINEAR, int8_codes
from ao_sparsity.masks import violations
from ao_sparsity.packed24 import compress, decompress
from ao_sparsity.sparse_cores import LAYOUTS, SEMI_SPARSE_PACKED_LINEAR, lay_out, rejects_layout, undo

S = TypeVar("S", bound="SemiSparseTensor")

_SLOWER_UP_TO = 128  # rows, of bfloat16 on an H100: docs/sparsity.md has the table


class SemiSparseTensor(QuantizedTensor):
    """Two of each four columns: ``kept`` ``[..., N, 2 G]`` in the outer dtype, G = ceil(K / 4).

    ``places`` uint8 ``[..., N, ceil(G / 2)]``: see :mod:`ao_sparsity.packed24`. Every device reads this
    layout.
    """

    data_names: ClassVar[tuple[str, ...]] = ("kept", "places")

    kept: torch.Tensor
    places: torch.Tensor

    def map(
        self: S,
        fn: Callable[[torch.Tensor], torch.Tensor],
        *,
        only: tuple[str, ...] | None = None,
        shape: tuple[int, ...] | torch.Size | None = None,
        dtype: torch.dtype | None = None,
    ) -> S:
        """As the base class; a new dtype is that of float values too."""
        made = super().map(fn, only=only, shape=shape, dtype=dtype)
        if made.kept.is_floating_point() and made.kept.dtype != made.dtype:
            made.kept = made.kept.to(made.dtype)
        return made

    def dequantize(self) -> torch.Tensor:
        """The weight with its zeros."""
        return decompress(self.kept, self.places, self.shape[-1])

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::semi_sparse_linear``."""
        out: torch.Tensor = SEMI_SPARSE_LINEAR(x, self.kept, self.places, bias, provider=self.provider)
        return out

    def repacked(self) -> QuantizedTensor:
        """In the layout of the device's sparse tensor cores, where it has some that take this weight."""
        if self.provider not in (None, "torch") or type(self.kept) is not torch.Tensor:
            return self
        for layout in LAYOUTS:
            if rejects_layout(layout, tuple(self.shape), self.kept.dtype, self.device) is None:
                return PackedSparseTensor.from_plain(self, layout)
        return self


class SemiSparseInt8Tensor(SemiSparseTensor):
    """int8 ``kept``, ``places``, ``scale`` float32 ``[..., N, 1]``; activations are quantized too."""

    data_names = ("kept", "places", "scale")

    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """``codes * scale`` in float32, cast to the outer dtype."""
        codes = decompress(self.kept, self.places, self.shape[-1])
        return affine.dequantize(codes, self.scale, dtype=self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::semi_sparse_int8_linear``."""
        out: torch.Tensor = SEMI_SPARSE_INT8_LINEAR(
            x, self.kept, self.places, self.scale, bias, provider=self.provider
        )
        return out


class PackedSparseTensor(QuantizedTensor):
    """Either weight ``[N, K]`` in a layout of sparse tensor cores; see :mod:`ao_sparsity.sparse_cores`.

    Moving, saving, casting and looking up rows go through the layout that every device reads.
    """

    data_names = ("packed", "meta", "scale")
    attr_names = ("layout_name",)
    row_data = ()

    packed: torch.Tensor
    meta: torch.Tensor | None
    scale: torch.Tensor | None
    layout_name: str

    @classmethod
    def from_plain(cls, weight: SemiSparseTensor, layout: str) -> PackedSparseTensor:
        """Lay ``weight`` out for the device where it lies."""
        dense = decompress(weight.kept, weight.places, weight.shape[-1])
        packed, meta = lay_out(dense, layout)
        return cls(
            packed, meta, weight.stored().get("scale"), shape=weight.shape, dtype=weight.dtype,
            scheme=weight.scheme, provider=weight.provider, layout_name=layout,
        )  # fmt: skip

    def portable(self) -> SemiSparseTensor:
        """In the layout that every device reads; the values are the same."""
        values = compress(self._codes())
        kind, more = (SemiSparseTensor, ()) if self.scale is None else (SemiSparseInt8Tensor, (self.scale,))
        return kind(
            *values, *more, shape=self.shape, dtype=self.dtype, scheme=self.scheme, provider=self.provider
        )

    def _codes(self) -> torch.Tensor:
        return undo(self.packed, self.meta, (self.shape[0], self.shape[1]), self.layout_name)

    def dequantize(self) -> torch.Tensor:
        """The weight with its zeros, in the outer dtype."""
        if self.scale is None:
            return self._codes().to(self.dtype)
        return affine.dequantize(self._codes(), self.scale, dtype=self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::semi_sparse_packed_linear``."""
        out: torch.Tensor = SEMI_SPARSE_PACKED_LINEAR(
            x, self.packed, self.meta, self.scale, bias, self.shape[0], self.layout_name,
            provider=self.provider,
        )  # fmt: skip
        return out


class _SemiSparse(Scheme):
    """What both schemes share: nothing is pruned here, and what is not 2:4 is refused."""

    rowwise: ClassVar[bool] = True

    def rejects_values(self, weight: torch.Tensor) -> str | None:
        """A weight that is not 2:4."""
        if not (bad := violations(weight, 2, 4)):
            return None
        groups = weight[..., 0].numel() * -(-weight.shape[-1] // 4)
        return (
            f"{bad} of its {groups} groups of four columns hold more than two non-zeros, and it is not "
            "pruned here. Prune it before, in the same call: ao_core.compress_(model, 'wanda:pattern=2:4', "
            f"batches, scheme={self.name!r})"
        )

    def slower(self, weight: torch.Tensor, *, rows: int | None = None) -> str | None:
        """Without sparse tensor cores always; with them for few rows."""
        dtype = torch.int8 if isinstance(self, SemiSparseInt8Dynamic) else weight.dtype
        reasons = [rejects_layout(each, tuple(weight.shape), dtype, weight.device) for each in LAYOUTS]
        if all(reasons):
            return f"{reasons[0]}: it is decompressed for each product, which saves bytes, not time"
        if dtype == torch.int8:
            return "2:4 int8 products take 1.3 to 2.9 times as long as dense bfloat16 ones (one H100)"
        if rows is not None and rows > _SLOWER_UP_TO:
            return None
        return (
            f"2:4 products of up to {_SLOWER_UP_TO} rows take 1.4 to 2.6 times as long as dense ones "
            "(bfloat16, one H100); at 1024 rows and more they take 0.87 to 0.96 times as long"
        )

    def _checked(self, codes: torch.Tensor) -> torch.Tensor:
        if reason := self.rejects_values(codes):
            raise RejectedError(f"{self} can't store these codes: {reason}.")
        return codes


@dataclass(frozen=True)
class SemiSparse(_SemiSparse):
    """2:4 weights in their own dtype: two of each four columns and where they stand.

    In bfloat16 that is 9/16 of the bytes. A weight that is not 2:4 is refused. Columns that the last group
    of four lacks count as zeros.
    """

    name: ClassVar[str] = "semi-sparse"
    version: ClassVar[int] = 1
    tensor_types = (SemiSparseTensor, PackedSparseTensor)
    min_sqnr: ClassVar[float] = 100.0
    summary: ClassVar[str] = "2:4 weights, two of four columns stored; they must be pruned before"

    def choose_qparams(self, weight: torch.Tensor) -> QParams:
        """None: values are stored as they are."""
        return {}

    def encode(self, weight: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """The bits of the float32 values, int32 ``[..., N, C]``; that of -0 is 0."""
        return (weight.float() + 0.0).contiguous().view(torch.int32)

    def decode(self, codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """The values, float32."""
        return codes.contiguous().view(torch.float32)

    def pack(self, codes: torch.Tensor, qparams: QParams, *, dtype: torch.dtype) -> SemiSparseTensor:
        """What is not zero, in ``dtype``.

        Raises:
            RejectedError: the codes are not 2:4.
        """
        values, indices = compress(self.decode(self._checked(codes), qparams).to(dtype))
        return SemiSparseTensor(values, indices, shape=codes.shape, dtype=dtype)


@dataclass(frozen=True)
class SemiSparseInt8Dynamic(_SemiSparse):
    """2:4 int8 weights, one scale a row, and int8 activations, one scale a token.

    It takes 5/16 of the bytes of bfloat16. A weight that is not 2:4 is refused. Columns that the last group
    of four lacks count as zeros.
    """

    name: ClassVar[str] = "semi-sparse-int8-dynamic"
    version: ClassVar[int] = 1
    tensor_types = (SemiSparseInt8Tensor, PackedSparseTensor)
    min_sqnr: ClassVar[float] = 40.0
    min_linear_sqnr: ClassVar[float] = 38.0
    summary: ClassVar[str] = "2:4 int8 weights, pruned before; int8 activations, one scale a token"

    def choose_qparams(self, weight: torch.Tensor) -> QParams:
        """``scale`` ``[..., N, 1]``, float32."""
        return {"scale": int8_codes(weight)[1]}

    def encode(self, weight: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """Codes ``int8 [..., N, C]`` in [-127, 127]; 0 is exact."""
        return affine.quantize(weight, qparams["scale"], qmin=-127, qmax=127)

    def decode(self, codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """``codes * scale``, float32."""
        return affine.dequantize(codes, qparams["scale"])

    def pack(self, codes: torch.Tensor, qparams: QParams, *, dtype: torch.dtype) -> SemiSparseInt8Tensor:
        """What is not zero.

        Raises:
            RejectedError: the codes are not 2:4.
        """
        values, indices = compress(self._checked(codes))
        return SemiSparseInt8Tensor(values, indices, qparams["scale"], shape=codes.shape, dtype=dtype)
