"""The base of every quantized weight: a tensor that stores less than it says.

A subclass lists the tensors that it stores in ``data_names`` and its options in ``attr_names``, and
writes ``dequantize()``. Everything else is given; overriding ``linear`` is the optimisation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
import torch.nn.functional as F

Q = TypeVar("Q", bound="QuantizedTensor")

HANDLERS: dict[Any, Callable[..., Any]] = {}
"""What each aten op does to a quantized tensor; :mod:`ao_core.tensor.handlers` fills it."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""The same for torch functions that must be caught before autograd, filled there too."""


class QuantizedTensor(torch.Tensor):
    """A weight ``[..., N, K]`` stored in another form.

    It has the shape, dtype and device of the float weight that it replaces, never requires grad,
    and passes gradients through to the activations.

    Args:
        *data: the stored tensors, in the order of ``data_names``; None for an absent optional one.
        shape: the outer shape ``[..., N, K]``.
        dtype: the outer dtype, that of the weight it stands for.
        scheme: the text of the scheme that made it, such as ``"int8-weight-only"``.
        provider: the kernel provider that a plan pinned, or None.
        **attrs: one value for each of ``attr_names``: JSON-able and hashable.

    Class attributes:
        data_names: names of the stored tensors.
        attr_names: names of the options.
        row_data: those of ``data_names`` that are cut along with the outer tensor when it is sliced,
            split or looked up along any dimension but the last; all of them by default. Such a tensor
            has the outer tensor's size in that dimension. If there are none, :meth:`portable` is cut.
    """

    data_names: ClassVar[tuple[str, ...]] = ()
    attr_names: ClassVar[tuple[str, ...]] = ()
    row_data: ClassVar[tuple[str, ...] | None] = None

    scheme: str
    provider: str | None

    _flat: tuple[list[str], tuple[Any, ...]]
    _size: torch.Size
    _stride: tuple[int, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torch.serialization.add_safe_globals([cls])

    def __new__(
        cls: type[Q],
        *data: torch.Tensor | None,
        shape: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        scheme: str = "",
        provider: str | None = None,
        **attrs: Any,
    ) -> Q:
        """Make the wrapper; see the class for the arguments."""
        first = next(tensor for tensor in data if tensor is not None)
        return torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=first.device, requires_grad=False
        )

    def __init__(
        self,
        *data: torch.Tensor | None,
        shape: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        scheme: str = "",
        provider: str | None = None,
        **attrs: Any,
    ) -> None:
        if len(data) != len(self.data_names) or set(attrs) != set(self.attr_names):
            raise TypeError(
                f"{type(self).__name__} takes tensors {self.data_names} and options {self.attr_names}, "
                f"and was given {len(data)} tensors and options {tuple(attrs)}."
            )
        for name, tensor in zip(self.data_names, data, strict=True):
            setattr(self, name, tensor)
        for name in self.attr_names:
            setattr(self, name, attrs[name])
        self.scheme, self.provider = scheme, provider

    def dequantize(self) -> torch.Tensor:
        """The float weight that this stands for: ``[..., N, K]`` of the outer dtype."""
        raise NotImplementedError(f"{type(self).__name__} must define dequantize()")

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T + bias`` for ``x`` ``[..., K]`` and a weight ``[N, K]``.

        The result ``[..., N]`` has the dtype of ``x``. Called without autograd: ``F.linear`` adds the
        gradient.
        """
        return F.linear(x, self.dequantize().to(x.dtype), bias)

    def batched_linear(self, x: torch.Tensor) -> torch.Tensor:
        """``x[e] @ weight[e].T`` for ``x`` ``[E, M, K]`` and a weight ``[E, N, K]``: ``[E, M, N]``."""
        experts, rows, _ = x.shape
        return self.grouped_linear(x.flatten(0, 1), None).view(experts, rows, self.shape[1])

    def grouped_linear(self, x: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        """Rows of ``x`` ``[S, K]``, sorted by expert, times their experts of a weight ``[E, N, K]``.

        Called without autograd, as :meth:`linear`; overriding it makes one call of E.

        Args:
            x: float ``[S, K]``.
            offsets: integers ``[E]``: expert ``e`` has rows ``[offsets[e - 1], offsets[e])``; rows from the
                last one on give zeros. None: all experts have S / E rows.

        Returns:
            ``[S, N]`` in the dtype of ``x``.
        """
        known = offsets is None or (type(offsets) is torch.Tensor and offsets.device.type == "cpu")
        if not known:  # reading them would make the host wait, and in a graph they have no values
            return torch._grouped_mm(x, self.dequantize().to(x.dtype).transpose(-2, -1), offsets)
        experts, n, _ = self.shape
        each = x.shape[0] // max(experts, 1)
        ends = [each * (e + 1) for e in range(experts)] if offsets is None else offsets.tolist()
        *parts, rest = x.tensor_split(ends)
        weights: list[QuantizedTensor] = list(self.unbind(0))  # type: ignore[arg-type]
        rows = [w.linear(part, None) for w, part in zip(weights, parts, strict=True) if part.shape[0]]
        return torch.cat([*rows, rest.new_zeros(rest.shape[0], n)])

    def rows(self, index: torch.Tensor) -> QuantizedTensor:
        """Rows ``index`` (integers ``[R]``) along the first dimension: what an embedding looks up."""
        return self[index]  # type: ignore[return-value]

    def portable(self) -> QuantizedTensor:
        """The same weight in a layout that every device can read: what a checkpoint holds.

        A class whose layout serves one kind of device overrides this and :meth:`repacked`.
        """
        return self

    def repacked(self) -> QuantizedTensor:
        """The same weight in the layout that is best where it lies.

        Called after quantizing, loading, and moving to another device.
        """
        return self

    def stored(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name, without the absent ones."""
        named = {name: getattr(self, name) for name in self.data_names}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def attributes(self) -> dict[str, Any]:
        """The options by name."""
        return {name: getattr(self, name) for name in self.attr_names}

    def map(
        self: Q,
        fn: Callable[[torch.Tensor], torch.Tensor],
        *,
        only: tuple[str, ...] | None = None,
        shape: tuple[int, ...] | torch.Size | None = None,
        dtype: torch.dtype | None = None,
    ) -> Q:
        """A tensor of the same class with ``fn`` applied to each stored tensor (or those in ``only``)."""
        data = [
            tensor if tensor is None or (only is not None and name not in only) else fn(tensor)
            for name, tensor in ((name, getattr(self, name)) for name in self.data_names)
        ]
        return type(self)(
            *data,
            shape=self.shape if shape is None else shape,
            dtype=dtype or self.dtype,
            scheme=self.scheme,
            provider=self.provider,
            **self.attributes(),
        )

    def share_memory_(self: Q) -> Q:
        """Move the stored tensors to shared memory, for other processes."""
        for tensor in self.stored().values():
            tensor.share_memory_()
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={dtype}, "
            f"device={str(self.device)!r}, scheme={self.scheme!r})"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        for kept in ("_flat", "_size", "_stride"):
            self.__dict__.pop(kept, None)

    # A compiled model asks each weight for its flattened form in every call, torch up to 2.11 for size and
    # stride too. They are kept until an attribute is set: reading one that is there takes 25 ns, torch's own
    # size of a subclass 8 µs.

    def size(self, dim: int | None = None) -> Any:
        """As :meth:`torch.Tensor.size`."""
        try:
            size = self._size
        except AttributeError:
            size, _ = self._outer()
        return size if dim is None else size[dim]

    def stride(self, dim: int | None = None) -> Any:
        """As :meth:`torch.Tensor.stride`."""
        try:
            stride = self._stride
        except AttributeError:
            _, stride = self._outer()
        return stride if dim is None else stride[dim]

    def _outer(self) -> tuple[Any, Any]:
        """Size and stride; kept, except while torch.compile traces."""
        with torch._C.DisableTorchFunctionSubclass():
            size, stride = super().size(), super().stride()
        if not torch.compiler.is_compiling():
            self.__dict__.update(_size=size, _stride=stride)
        return size, stride

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        try:
            return self._flat
        except AttributeError:
            options = tuple(self.attributes().items())
            flat = list(self.stored()), (self.dtype, self.scheme, self.provider, options)
            self.__dict__["_flat"] = flat
            return flat

    @classmethod
    def __tensor_unflatten__(
        cls: type[Q],
        inner: dict[str, torch.Tensor],
        context: tuple[Any, ...],
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
    ) -> Q:
        dtype, scheme, provider, options = context
        data = [inner.get(name) for name in cls.data_names]
        return cls(*data, shape=outer_size, dtype=dtype, scheme=scheme, provider=provider, **dict(options))

    def _stable_hash_for_caching(self) -> str:
        """What torch.compile's cache on disk may tell two weights apart by: metadata, never values."""
        inner = [(n, t.shape, t.dtype, t.device, t.stride()) for n, t in self.stored().items()]
        text = repr((type(self).__qualname__, self.shape, self.__tensor_flatten__(), inner))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (handler := FUNCTIONS.get(func)) is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = HANDLERS.get(func)
        if handler is None:
            refuse(cls, func)
        return handler(*args, **(kwargs or {}))


def refuse(cls: type, func: Any) -> NoReturn:
    """Raise for an op that a class does not know, naming both."""
    raise NotImplementedError(
        f"{cls.__name__} does not implement {func}. Call .dequantize() for a plain tensor, or define "
        "the op in a subclass."
    )
