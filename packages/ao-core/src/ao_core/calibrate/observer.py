"""Seeing the inputs that weights meet, wherever they are multiplied.

Hooks see modules being called. Expert stacks are parameters that their module indexes, transposes and
multiplies as it likes, so that torch's functions are watched instead: those that take a view of a weight
out, and those that multiply by one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Seen = Callable[[str, int, torch.Tensor, torch.Tensor], None]
"""Called with a layer's name, the index of the matrix in its stack (0 of a plain weight), the input
``[..., K]``, and what the whole multiplication returned."""

_TRANSPOSES = ("t", "T", "mT")
_SAME = ("detach", "contiguous", "to", "type_as", "float", "bfloat16", "half", "clone")
# Function name → which of its arguments are multiplied.
_PRODUCTS = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
}
_KEYWORDS = (("mat1", "batch1", "input"), ("mat2", "batch2", "weight", "other"))
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")  # torch's, and transformers' stand-in


@dataclass(frozen=True)
class _View:
    """A weight or what was cut out of it.

    ``index`` says which matrices of a stack: one, one for each row of a tensor, or None for all.
    """

    name: str
    ndim: int
    index: int | torch.Tensor | None = None
    transposed: bool = False

    @property
    def single(self) -> int | None:
        """Index of the only matrix that this is, or None."""
        return 0 if self.ndim == 2 else self.index if isinstance(self.index, int) else None


class Observer(TorchFunctionMode):
    """Inside the block, report each multiplication by one of ``weights``.

    Args:
        weights: name → parameter ``[N, K]``, or ``[E, N, K]`` of experts.
        seen: what to call.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], seen: Seen) -> None:
        super().__init__()
        self._seen = seen
        self._views: dict[int, tuple[weakref.ref[torch.Tensor], _View]] = {}
        for name, weight in weights.items():
            self._watch(weight, _View(name, weight.ndim))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if name := _name(func):
            if name in _PRODUCTS or name in _GROUPED:
                self._multiplied(name, args, kwargs or {}, out)
            elif args and (view := self._view(args[0])) is not None:
                self._cut(name, args[1:], view, args[0], out)
        return out

    def _watch(self, tensor: torch.Tensor, view: _View) -> None:
        self._views[id(tensor)] = (weakref.ref(tensor), view)

    def _view(self, tensor: Any) -> _View | None:
        found = self._views.get(id(tensor))
        # An id is used again once its tensor is gone.
        return found[1] if found is not None and found[0]() is tensor else None

    def _cut(self, name: str, args: tuple[Any, ...], view: _View, source: torch.Tensor, out: Any) -> None:
        """Follow what was taken out of a weight."""
        last_two = {source.ndim - 1, source.ndim - 2}
        if name in _TRANSPOSES or (
            name == "transpose" and {dim % source.ndim for dim in args[:2]} == last_two
        ):
            self._watch(out, replace(view, transposed=not view.transposed))
        elif name in _SAME and isinstance(out, torch.Tensor) and out.shape == source.shape:
            if out is not source:
                self._watch(out, view)
        elif view.ndim == 3 and view.index is None and not view.transposed:
            if name == "unbind" and not any(args):
                for number, matrix in enumerate(out):
                    self._watch(matrix, replace(view, index=number))
            elif name == "__getitem__" or (name == "select" and args[0] == 0):
                index = _index(args[-1], source.shape[0])
                if index is not None:
                    self._watch(out, replace(view, index=index))

    def _multiplied(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        left, right, offsets = _operands(name, args, kwargs)
        view = self._view(right)
        if name in _GROUPED:
            if view is not None and view.ndim == 3 and view.transposed and offsets is not None:
                self._by_offsets(view, left, offsets, out)
        elif view is not None and view.transposed != (name == "linear"):
            self._by_index(view, left, out)
        elif name != "linear" and (view := self._view(left)) is not None and not view.transposed:
            self._by_index(view, right.transpose(-1, -2), out)  # W x, with x [..., K, m]

    def _by_index(self, view: _View, x: torch.Tensor, out: Any) -> None:
        if view.single is not None:
            self._seen(view.name, view.single, x, out)
        elif x.ndim == 3 and isinstance(view.index, torch.Tensor):  # one matrix for each x[i]
            for index in view.index.unique().tolist():
                self._seen(view.name, index, x[view.index == index], out)
        elif x.ndim == 3 and view.index is None:  # [E, m, K]
            for index, rows in enumerate(x.unbind(0)):
                self._seen(view.name, index, rows, out)

    def _by_offsets(self, view: _View, x: torch.Tensor, offsets: torch.Tensor, out: Any) -> None:
        """Rows ``offsets[e - 1]`` to ``offsets[e]`` meet matrix ``e``."""
        start = 0
        for index, end in enumerate(offsets.tolist()):
            if end > start:
                self._seen(view.name, index, x[start:end], out)
            start = end


def _name(func: Any) -> str | None:
    name: str = getattr(func, "__name__", "")
    if name == "__get__":  # a property, such as Tensor.mT
        return next((p for p in _TRANSPOSES[1:] if func == getattr(torch.Tensor, p).__get__), None)
    return name


def _operands(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Both factors, and the offsets of a grouped product."""
    factors = [
        args[place] if place < len(args) else next((kwargs[key] for key in keys if key in kwargs), None)
        for place, keys in zip(_PRODUCTS.get(name, (0, 1)), _KEYWORDS, strict=True)
    ]
    return factors[0], factors[1], kwargs.get("offs", args[2] if len(args) > 2 else None)


def _index(index: Any, size: int) -> int | torch.Tensor | None:
    """One matrix of ``size`` or a tensor of indices; None for anything else, which is not followed."""
    if isinstance(index, int):
        return index % size
    if isinstance(index, torch.Tensor) and not index.dtype.is_floating_point and index.dtype != torch.bool:
        return int(index) % size if index.ndim == 0 else index % size if index.ndim == 1 else None
    return None
