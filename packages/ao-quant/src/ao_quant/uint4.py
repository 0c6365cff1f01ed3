"""Unsigned 4-bit integers as a tensor of their own, and a scheme that stores weights in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch

from ao_core import QParams, Scheme
from ao_core.numerics import pack
from ao_quant.int4 import Int4Tensor
from ao_quant.ranges import MIDDLE

aten = torch.ops.aten
_UINT4: torch.dtype = torch.uint4  # type: ignore[attr-defined]


class UInt4Tensor(torch.Tensor):
    """Integers in [0, 15], two to a byte along the last dimension, the first in the low four bits.

    Views, slices, ``select``, ``unbind``, ``t`` of two dimensions (a copy), ``==``, ``clone`` and ``.to``
    work on the packed bytes. Cuts along the last dimension start at an even index. ``.to(torch.uint8)``
    unpacks; ``.view(torch.uint8)`` is the packed bytes. Anything else raises, naming the op.

    Args:
        packed: uint8 ``[..., ceil(K / 2)]``.
        columns: K.
    """

    packed: torch.Tensor

    def __new__(cls, packed: torch.Tensor, columns: int) -> UInt4Tensor:
        """Wrap packed bytes; see the class."""
        if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != -(-columns // 2):
            raise ValueError(
                f"{columns} columns of 4 bits are uint8 [..., {-(-columns // 2)}], and {packed.dtype} "
                f"{tuple(packed.shape)} was given. UInt4Tensor.from_uint8 packs codes."
            )
        shape = (*packed.shape[:-1], columns)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=_UINT4, device=packed.device)

    def __init__(self, packed: torch.Tensor, columns: int) -> None:
        self.packed = packed

    @classmethod
    def from_uint8(cls, codes: torch.Tensor) -> UInt4Tensor:
        """Pack integer ``codes`` ``[..., K]`` in [0, 15].

        Raises:
            TypeError: codes of a floating dtype.
            ValueError: a code out of range.
        """
        return cls(pack.pack(codes, bits=4), codes.shape[-1])

    def unpacked(self) -> torch.Tensor:
        """The integers as uint8 ``[..., K]``."""
        return pack.unpack(self.packed, bits=4, columns=self.shape[-1])

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["packed"], self.shape[-1]

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], columns: int, outer_size: Any, outer_stride: Any
    ) -> UInt4Tensor:
        return cls(inner["packed"], columns)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"UInt4Tensor(shape={tuple(self.shape)}, device={str(self.device)!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            _refuse(str(func))
        return handler(*args, **(kwargs or {}))


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"UInt4Tensor does not implement {what}. Call .to(torch.uint8) for plain integers."
    )


def _view(tensor: UInt4Tensor, size: list[int]) -> UInt4Tensor:
    """Another shape; rows of an odd length end in half a byte, and can't be joined or split."""
    *outer, columns = torch.empty(tensor.shape, device="meta").view(size).shape  # with torch's own errors
    if columns != tensor.shape[-1] and (columns % 2 or tensor.shape[-1] % 2):
        _refuse(f"a view of {tuple(tensor.shape)} as {tuple(size)}: rows of an odd length stay as they are")
    return UInt4Tensor(tensor.packed.view(*outer, -(-columns // 2)), columns)


def _view_dtype(tensor: UInt4Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == _UINT4:
        return _map(torch.Tensor.detach)(tensor)
    if dtype != torch.uint8:
        _refuse(f"a view as {dtype}, only as torch.uint8, which is the packed bytes")
    return tensor.packed.detach()


def _to_copy(
    tensor: UInt4Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any
) -> torch.Tensor:
    packed = tensor.packed.to(device) if device is not None else tensor.packed.clone()
    moved = UInt4Tensor(packed, tensor.shape[-1])
    return moved if dtype in (None, _UINT4) else moved.unpacked().to(dtype)


def _slice(
    tensor: UInt4Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> UInt4Tensor:
    dim %= tensor.ndim
    if dim < tensor.ndim - 1:
        return UInt4Tensor(aten.slice.Tensor(tensor.packed, dim, start, end, step), tensor.shape[-1])
    first, last, _ = slice(start, end, step).indices(tensor.shape[-1])
    if step != 1 or first % 2:
        _refuse(f"columns [{first}:{last}:{step}], only those from an even one on, one by one")
    columns = max(last - first, 0)
    return UInt4Tensor(tensor.packed[..., first // 2 : (first + columns + 1) // 2], columns)


def _select(tensor: UInt4Tensor, dim: int, index: int) -> torch.Tensor:
    dim %= tensor.ndim
    if dim < tensor.ndim - 1:
        return UInt4Tensor(tensor.packed.select(dim, index), tensor.shape[-1])
    column = index % tensor.shape[-1]
    byte = tensor.packed.select(-1, column // 2)
    return (byte >> 4) if column % 2 else (byte & 15)


def _unbind(tensor: UInt4Tensor, dim: int = 0) -> list[torch.Tensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _transposed(tensor: UInt4Tensor, *dims: int) -> UInt4Tensor:
    if tensor.ndim != 2:
        _refuse(f"a transposition of {tensor.ndim} dimensions")
    return UInt4Tensor.from_uint8(tensor.unpacked().t().contiguous())


def _equal(left: Any, right: Any) -> torch.Tensor:
    values = [each.unpacked() if isinstance(each, UInt4Tensor) else each for each in (left, right)]
    return torch.eq(*values)


def _map(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., UInt4Tensor]:
    return lambda tensor, **_: UInt4Tensor(fn(tensor.packed), tensor.shape[-1])


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _map(torch.Tensor.detach),
    aten.alias.default: _map(torch.Tensor.detach),
    aten.clone.default: _map(torch.Tensor.clone),
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.view.dtype: _view_dtype,
    aten._to_copy.default: _to_copy,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.t.default: _transposed,
    aten.transpose.int: _transposed,
    aten.eq.Tensor: _equal,
    aten.eq.Scalar: _equal,
}


class UInt4WeightTensor(Int4Tensor):
    """A weight in :class:`UInt4Tensor` codes, one scale a row: ``(q - 8) * scale``."""

    @property
    def codes(self) -> UInt4Tensor:
        """The codes ``[..., N, K]``, sharing memory with the weight."""
        return UInt4Tensor(self.packed, self.shape[-1])

    def repacked(self) -> UInt4WeightTensor:
        """As it is: the codes stay what they say."""
        return self


@dataclass(frozen=True)
class UInt4(Scheme):
    """Symmetric 4-bit weights, one scale a row: ``scale = absmax / 7.5``, codes ``round(w / scale) + 8``.

    Code 8 is zero, so that negative weights keep their sign.
    """

    name: ClassVar[str] = "uint4"
    version: ClassVar[int] = 1
    tensor_types = (UInt4WeightTensor,)
    min_sqnr: ClassVar[float] = 15.0
    rowwise: ClassVar[bool] = True
    summary: ClassVar[str] = "unsigned 4-bit weights, one scale a row; float activations"

    def choose_qparams(self, weight: torch.Tensor) -> QParams:
        """``scale`` float32 ``[..., N, 1]``."""
        return {"scale": (weight.float().abs().amax(-1, keepdim=True) / 7.5).clamp_min_(1e-30)}

    def encode(self, weight: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """Codes ``uint8 [..., N, C]`` in [0, 15]."""
        steps = (weight.float() / qparams["scale"]).round_() + MIDDLE
        return steps.clamp_(0, 15).to(torch.uint8)

    def decode(self, codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """``(q - 8) * scale``, float32."""
        return (codes.float() - MIDDLE) * qparams["scale"]

    def pack(self, codes: torch.Tensor, qparams: QParams, *, dtype: torch.dtype) -> UInt4WeightTensor:
        """Two codes a byte; the scale as it is."""
        packed = pack.pack(codes, bits=4)
        return UInt4WeightTensor(
            packed, qparams["scale"], None, shape=codes.shape, dtype=dtype, group_size=-1
        )
