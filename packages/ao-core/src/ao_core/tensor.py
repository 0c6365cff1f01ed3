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
aten = torch.ops.aten


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
            has the outer tensor's size in that dimension.
    """

    data_names: ClassVar[tuple[str, ...]] = ()
    attr_names: ClassVar[tuple[str, ...]] = ()
    row_data: ClassVar[tuple[str, ...] | None] = None

    scheme: str
    provider: str | None

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
        """``x @ weight.T + bias`` for ``x`` ``[..., K]``; the result ``[..., N]`` has the dtype of ``x``.

        Called without autograd: ``F.linear`` adds the gradient.
        """
        return F.linear(x, self.dequantize().to(x.dtype), bias)

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

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        options = tuple(self.attributes().items())
        return list(self.stored()), (self.dtype, self.scheme, self.provider, options)

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
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            _refuse(cls, func)
        return handler(*args, **(kwargs or {}))


class TransposedWeight(QuantizedTensor):
    """``weight.t()`` of a quantized weight: ``[..., K, N]``, a view that stores nothing of its own."""

    data_names = ("base",)
    base: QuantizedTensor

    def dequantize(self) -> torch.Tensor:
        """The base's values, transposed."""
        return self.base.dequantize().transpose(-2, -1)


class _Linear(torch.autograd.Function):
    """The gradient of a frozen quantized weight's linear, which keeps the weight quantized."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight
        return weight.linear(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.weight.dequantize().to(grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, grad_bias


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:  # noqa: A002 - F.linear's own name
    if not isinstance(weight, QuantizedTensor) or isinstance(input, QuantizedTensor):
        raise TypeError(
            "F.linear takes a plain activation and one quantized weight, and was given "
            f"{type(input).__name__} and {type(weight).__name__}. Call .dequantize() on the other."
        )
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return weight.linear(input, bias)


def _refuse(cls: type, func: Any) -> NoReturn:
    raise NotImplementedError(
        f"{cls.__name__} does not implement {func}. Call .dequantize() for a plain tensor, or define "
        "the op in a subclass."
    )


def _to_copy(
    tensor: Q,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Q:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(
            f"{type(tensor).__name__} can be cast to a floating dtype, not to {dtype}. "
            "Call .dequantize() for a plain tensor."
        )
    if isinstance(tensor, TransposedWeight):
        return _transpose(_to_copy(tensor.base, dtype=dtype, device=device, **kwargs))  # type: ignore[return-value]
    non_blocking = bool(kwargs.get("non_blocking", False))
    return tensor.map(lambda data: _moved(data, device, non_blocking), dtype=dtype)


def _moved(data: torch.Tensor, device: torch.device | None, non_blocking: bool) -> torch.Tensor:
    if device is None or data.device == device:
        return data.clone()
    return data.to(device, non_blocking=non_blocking)


def _copy_(target: Q, source: torch.Tensor, non_blocking: bool = False) -> Q:
    same = (
        type(target) is type(source)
        and target.shape == source.shape
        and target.attributes() == source.attributes()
        and target.stored().keys() == source.stored().keys()
    )
    if not same:
        raise TypeError(
            f"a {type(target).__name__} {tuple(target.shape)} can only be overwritten by a tensor of the "
            f"same class, shape and options, and the source is {_outline(source)}. To load a checkpoint use "
            "load_state_dict(..., assign=True) or ao_core.load; to quantize a float one, ao_core.quantize_."
        )
    for name, data in target.stored().items():
        data.copy_(getattr(source, name), non_blocking)
    return target


def _outline(tensor: torch.Tensor) -> str:
    options = tensor.attributes() if isinstance(tensor, QuantizedTensor) else ""
    return f"{type(tensor).__name__} {tuple(tensor.shape)} {options}".rstrip()


def _transpose(tensor: QuantizedTensor, *dims: int) -> QuantizedTensor:
    last_two = {tensor.ndim - 2, tensor.ndim - 1}
    if tensor.ndim < 2 or (dims and {dim % tensor.ndim for dim in dims} != last_two):
        _refuse(type(tensor), f"a transposition of dimensions {dims}")
    if isinstance(tensor, TransposedWeight):
        return tensor.base.map(lambda data: data.detach())  # autograd needs a new view
    shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
    return TransposedWeight(tensor, shape=shape, dtype=tensor.dtype, scheme=tensor.scheme)


def _permute(tensor: QuantizedTensor, dims: list[int]) -> QuantizedTensor:
    wanted = [dim % tensor.ndim for dim in dims]
    if wanted != [*range(tensor.ndim - 2), tensor.ndim - 1, tensor.ndim - 2]:
        _refuse(type(tensor), f"a permutation to {dims}")
    return _transpose(tensor)


def _mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if isinstance(right, TransposedWeight) and not isinstance(left, QuantizedTensor):
        return right.base.linear(left, None)
    return torch.mm(_plain(left), _plain(right))


def _addmm(
    bias: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    if bias.ndim == 1 and beta == alpha == 1 and isinstance(right, TransposedWeight):
        return right.base.linear(left, bias)
    return torch.addmm(_plain(bias), _plain(left), _plain(right), beta=beta, alpha=alpha)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def _cut(tensor: Q, dim: int, fn: Callable[[torch.Tensor, int], torch.Tensor], outer: tuple[int, ...]) -> Q:
    """Apply a cut along ``dim`` to the tensors that have that dimension."""
    if isinstance(tensor, TransposedWeight):
        _refuse(type(tensor), "a cut; cut before transposing")
    dim %= tensor.ndim
    names = tensor.row_data if tensor.row_data is not None else tuple(tensor.stored())
    for name in names:
        data = getattr(tensor, name)
        if data is not None and (data.ndim <= dim or data.shape[dim] != tensor.shape[dim]):
            raise NotImplementedError(
                f"{type(tensor).__name__} can't be cut along dimension {dim}: {name!r} is "
                f"{tuple(data.shape)} for a weight {tuple(tensor.shape)}. Call .dequantize() first."
            )
    if dim == tensor.ndim - 1:
        _refuse(type(tensor), "a cut along the input dimension (the last)")
    return tensor.map(lambda data: fn(data, dim), only=tuple(names), shape=outer)


def _slice(tensor: Q, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Q:
    size = tensor.shape[dim]
    length = len(range(*slice(start, end, step).indices(size)))
    if length == size:
        return tensor.map(lambda data: data.detach())
    outer = list(tensor.shape)
    outer[dim] = length
    return _cut(tensor, dim, lambda data, d: aten.slice.Tensor(data, d, start, end, step), tuple(outer))


def _select(tensor: Q, dim: int, index: int) -> Q:
    if tensor.ndim < 3 or dim % tensor.ndim >= tensor.ndim - 2:
        _refuse(type(tensor), f"select along dimension {dim} of a {tensor.ndim}-D weight")
    outer = tuple(size for d, size in enumerate(tensor.shape) if d != dim % tensor.ndim)
    return _cut(tensor, dim, lambda data, d: data.select(d, index), outer)


def _split(tensor: Q, sizes: int | list[int], dim: int = 0) -> list[Q]:
    total = tensor.shape[dim]
    lengths = sizes if isinstance(sizes, list) else [sizes] * (-(-total // max(sizes, 1)))
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    whole = sum(lengths) == total if isinstance(sizes, list) else sizes > 0
    if not whole or min(lengths) < 0:
        raise ValueError(f"dimension {dim} of {tuple(tensor.shape)} can't be split by {sizes}.")
    return [
        _slice(tensor, dim, start, min(start + length, total))
        for start, length in zip(starts, lengths, strict=True)
    ]


def _embedding(weight: QuantizedTensor, indices: torch.Tensor, *args: Any) -> torch.Tensor:
    flat = indices.reshape(-1)
    outer = (flat.numel(), weight.shape[-1])
    rows = _cut(weight, 0, lambda data, d: data.index_select(d, flat), outer)
    return rows.dequantize().reshape(*indices.shape, weight.shape[-1])


def _linear_aten(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return weight.linear(x, bias)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda tensor: tensor.map(lambda data: data.detach()),
    aten.alias.default: lambda tensor: tensor.map(lambda data: data.detach()),
    aten.clone.default: lambda tensor, **_: tensor.map(lambda data: data.clone()),
    aten.empty_like.default: lambda tensor, **kw: tensor.map(
        lambda data: torch.empty_like(data, device=kw.get("device")), dtype=kw.get("dtype")
    ),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.linear.default: _linear_aten,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.embedding.default: _embedding,
}
