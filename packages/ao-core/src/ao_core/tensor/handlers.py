"""What torch's ops do to a quantized weight. An op that is not here raises, naming the class and the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from ao_core.tensor.base import FUNCTIONS, HANDLERS, QuantizedTensor, refuse
from ao_core.tensor.wrappers import TransposedWeight

Q = TypeVar("Q", bound=QuantizedTensor)
aten = torch.ops.aten


class _Linear(torch.autograd.Function):
    """The gradient of a frozen quantized weight's linear, which keeps the weight quantized."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight
        out = weight.linear(x, bias)
        # Autograd lets nobody write into a view that was made here; this is the same memory, and none to it.
        return aten._unsafe_view(out, out.shape)  # type: ignore[no-any-return]

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
    with torch._C.DisableTorchFunctionSubclass():  # else reading the shape costs a microsecond and a half
        shape = weight.shape
    if len(shape) != 2:
        raise TypeError(
            f"F.linear takes a weight [N, K], and was given {tuple(shape)}. Take one of a stack by "
            "weight[index], or multiply all with torch.bmm(x, weight.transpose(-2, -1))."
        )
    if input.shape[-1] != shape[1]:
        raise RuntimeError(
            f"a linear with {shape[1]} input features was given an input {tuple(input.shape)}; its "
            "last dimension must match."
        )
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return weight.linear(input, bias)


def _to_copy(
    tensor: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> QuantizedTensor:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(
            f"{type(tensor).__name__} can be cast to a floating dtype, not to {dtype}. "
            "Call .dequantize() for a plain tensor."
        )
    if isinstance(tensor, TransposedWeight):
        return _transpose(_to_copy(tensor.base, dtype=dtype, device=device, **kwargs))
    device, dtype = device or tensor.device, dtype or tensor.dtype
    if (device, dtype) == (tensor.device, tensor.dtype):
        return tensor.map(torch.Tensor.clone)
    non_blocking = bool(kwargs.get("non_blocking", False))

    def moved(data: torch.Tensor) -> torch.Tensor:
        if isinstance(data, QuantizedTensor):  # below autograd torch does not break ``to`` down for it
            return _to_copy(data, device=device, non_blocking=non_blocking)
        return data.to(device, non_blocking=non_blocking) if data.device != device else data.clone()

    return tensor.portable().map(moved, dtype=dtype).repacked()


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
        refuse(type(tensor), f"a transposition of dimensions {dims}")
    if isinstance(tensor, TransposedWeight):
        return tensor.base.map(lambda data: data.detach())  # autograd needs a new view
    shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
    return TransposedWeight(tensor, shape=shape, dtype=tensor.dtype, scheme=tensor.scheme)


def _permute(tensor: QuantizedTensor, dims: list[int]) -> QuantizedTensor:
    wanted = [dim % tensor.ndim for dim in dims]
    if wanted != [*range(tensor.ndim - 2), tensor.ndim - 1, tensor.ndim - 2]:
        refuse(type(tensor), f"a permutation to {dims}")
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


def _bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if isinstance(right, TransposedWeight) and not isinstance(left, QuantizedTensor):
        _check_stack(left, right, left.shape[0])
        return right.base.batched_linear(left)
    if isinstance(left, QuantizedTensor) and not isinstance(left, TransposedWeight):
        _check_stack(_plain(right).transpose(1, 2), left.transpose(1, 2), right.shape[0])
        return left.batched_linear(_plain(right).transpose(1, 2)).transpose(1, 2)
    return torch.bmm(_plain(left), _plain(right))


def _grouped_mm(
    left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor | None = None, *rest: Any, **more: Any
) -> torch.Tensor:
    """Rows ``[offs[e - 1], offs[e])`` of ``left`` times expert ``e`` of a stack ``[E, N, K]``, transposed."""
    stack = isinstance(right, TransposedWeight) and right.ndim == 3
    extra = any(each is not None for each in (*rest, *more.values()))
    if extra or offs is None or not stack or isinstance(left, QuantizedTensor) or left.ndim != 2:
        return torch._grouped_mm(_plain(left), _plain(right), offs, *rest, **more)
    _check_stack(left, right, offs.shape[0])
    return right.base.grouped_linear(left, offs)  # type: ignore[attr-defined, no-any-return]


def _check_stack(left: torch.Tensor, right: torch.Tensor, experts: int) -> None:
    """Raise RuntimeError, as torch does, unless rows ``left`` fit the stack ``right`` ``[E, K, N]``."""
    if (experts, left.shape[-1]) != tuple(right.shape[:2]):
        raise RuntimeError(
            f"rows {tuple(left.shape)} for {experts} experts do not fit a stack {tuple(right.shape)} of "
            f"{right.shape[0]} experts with {right.shape[1]} input features each."
        )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def _cut(tensor: Q, dim: int, fn: Callable[[torch.Tensor, int], torch.Tensor], outer: tuple[int, ...]) -> Q:
    """Apply a cut along ``dim`` to the tensors that have that dimension."""
    if isinstance(tensor, TransposedWeight):
        refuse(type(tensor), "a cut; cut before transposing")
    dim %= tensor.ndim
    names = tensor.row_data if tensor.row_data is not None else tuple(tensor.stored())
    if not names and (portable := tensor.portable()) is not tensor:
        return _cut(portable, dim, fn, outer)  # type: ignore[return-value]
    if not names:
        raise NotImplementedError(
            f"{type(tensor).__name__} can't be cut along dimension {dim}: its row_data is empty and it "
            "has no portable() form. Call .dequantize() for a plain tensor, or keep it out of FSDP2 with "
            "fully_shard(..., ignored_params={layer.weight})."
        )
    for name in names:
        data = getattr(tensor, name)
        if data is not None and (data.ndim <= dim or data.shape[dim] != tensor.shape[dim]):
            raise NotImplementedError(
                f"{type(tensor).__name__} can't be cut along dimension {dim}: {name!r} is "
                f"{tuple(data.shape)} for a weight {tuple(tensor.shape)}. Call .dequantize() first."
            )
    if dim == tensor.ndim - 1:
        refuse(type(tensor), "a cut along the input dimension (the last)")
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
        refuse(type(tensor), f"aten.select along dimension {dim} of a {tensor.ndim}-D weight")
    outer = tuple(size for d, size in enumerate(tensor.shape) if d != dim % tensor.ndim)
    return _cut(tensor, dim, lambda data, d: data.select(d, index), outer)


def _unbind(tensor: Q, dim: int = 0) -> list[Q]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _index(tensor: Q, indices: list[torch.Tensor | None]) -> Q:
    """``tensor[index]`` for one integer tensor: rows, or experts of a stack."""
    index = indices[0]
    if len(indices) != 1 or index is None or index.dtype not in (torch.int64, torch.int32) or index.ndim != 1:
        refuse(type(tensor), "aten.index with other than one list of integers along the first dimension")
    outer = (index.shape[0], *tensor.shape[1:])
    return _cut(tensor, 0, lambda data, d: data.index_select(d, index), outer)


def _same_view(tensor: Q, size: list[int], *rest: Any, **more: Any) -> Q:
    """A view in the shape that it has already, as ``torch.matmul`` asks for."""
    wanted = [old if new == -1 else new for old, new in zip(tensor.shape, size, strict=False)]
    if len(size) != tensor.ndim or wanted != list(tensor.shape):
        refuse(type(tensor), f"aten.view as {tuple(size)}")
    return tensor.map(torch.Tensor.detach)


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
    rows = weight.rows(indices.reshape(-1))
    return rows.dequantize().reshape(*indices.shape, weight.shape[-1])


def _linear_aten(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return weight.linear(x, bias)


def _convolution(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A convolution with its weight dequantized: below autograd, it would have no gradient."""

    def run(input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
        return fn(_plain(input), _plain(weight).to(input.dtype), *args, **kwargs)

    return run


FUNCTIONS[F.linear] = _linear
FUNCTIONS.update({fn: _convolution(fn) for fn in (F.conv1d, F.conv2d, F.conv3d)})

HANDLERS.update(
    {
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
        aten.bmm.default: _bmm,
        aten.index.Tensor: _index,
        aten.unbind.int: _unbind,
        aten.expand.default: _same_view,
        aten.view.default: _same_view,
        aten._unsafe_view.default: _same_view,
    }
)
if hasattr(aten, "_grouped_mm"):
    HANDLERS[aten._grouped_mm.default] = _grouped_mm
