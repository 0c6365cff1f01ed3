"""What FSDP2 and DTensor do to a parameter, for weights whose stored tensors are cut along the rows.

``fully_shard`` cuts a parameter along its first dimension and fills each shard up to the size of the first;
DTensor redistributes in the same way. Here that is done to the stored tensors. A layout without rows is
sharded in its portable form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch

from ao_core.tensor import handlers
from ao_core.tensor.base import HANDLERS, QuantizedTensor, refuse
from ao_core.tensor.fsdp import from_bytes, leaves_of, rebuilt, row_bytes, row_names

Q = TypeVar("Q", bound=QuantizedTensor)
aten = torch.ops.aten


class FlatWeight(QuantizedTensor):
    """``weight.view(-1)``: FSDP2 keeps one of each shard, and asks nothing of it."""

    data_names = ("base",)
    base: QuantizedTensor

    def dequantize(self) -> torch.Tensor:
        """The base's values in one dimension."""
        return self.base.dequantize().reshape(-1)


def _rejects(tensor: QuantizedTensor) -> str | None:
    """Why the stored tensors can't be cut along the rows, or None."""
    found = [(name, getattr(tensor, name)) for name in row_names(tensor)]
    held = [(name, data) for name, data in found if data is not None]
    if not held:
        return "none of its stored tensors has its rows"
    for name, data in held:
        if data.ndim == 0 or data.shape[0] != tensor.shape[0]:
            return f"{name!r} is {tuple(data.shape)} for a weight {tuple(tensor.shape)}"
        if isinstance(data, QuantizedTensor) and (reason := _rejects(data)):
            return reason
    return None


def _with_rows(tensor: QuantizedTensor) -> QuantizedTensor:
    """``tensor``, or its portable form if its own layout has no rows."""
    reason = _rejects(tensor)
    if reason is None:
        return tensor
    portable = tensor.portable()
    if portable is tensor or (reason := _rejects(portable)):
        raise NotImplementedError(
            f"{type(tensor).__name__} can't be sharded by rows: {reason}. Leave the layer out with "
            "fully_shard(..., ignored_params={layer.weight}), or let the class name in row_data which of its "
            "tensors have rows, or override portable()."
        )
    return portable


def _each(tensor: QuantizedTensor, rows: int, fn: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedTensor:
    """``fn`` of each leaf, which gives it ``rows`` rows."""
    whole = _with_rows(tensor)
    return rebuilt(whole, iter([fn(leaf) for leaf in leaves_of(whole)]), rows)


def _refuse(tensor: QuantizedTensor, what: str) -> NoReturn:
    raise NotImplementedError(
        f"{type(tensor).__name__} {tuple(tensor.shape)} does not implement {what}; it is sharded by "
        "rows only: fully_shard without shard_placement_fn, or Shard(0). Call .dequantize() for a plain one."
    )


def _new(make: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor], name: str) -> Callable[..., Any]:
    """``new_zeros`` or ``new_empty``: the same weight with another number of rows."""

    def run(tensor: QuantizedTensor, size: Sequence[int], **options: Any) -> QuantizedTensor:
        rows, *rest = size
        same = rest == list(tensor.shape[1:]) or list(size) == [0]  # what a rank without any rows gets
        own = {"dtype": tensor.dtype, "device": tensor.device, "layout": torch.strided, "pin_memory": False}
        odd = {key: value for key, value in options.items() if value not in (None, own.get(key))}
        if not same or odd:
            _refuse(tensor, f"aten.{name} in the size {tuple(size)} {odd or ''}".rstrip())
        return _each(tensor, rows, lambda leaf: make(leaf, (rows, *leaf.shape[1:])))

    return run


def _as_strided(
    tensor: QuantizedTensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> QuantizedTensor:
    """The first rows."""
    dense = [math.prod(size[dim + 1 :]) for dim in range(len(size))]
    first = list(size[1:]) == list(tensor.shape[1:]) and size[0] <= tensor.shape[0]
    if not first or list(stride) != dense or offset:
        _refuse(tensor, f"aten.as_strided in the size {tuple(size)}, stride {tuple(stride)}, offset {offset}")
    return handlers._slice(tensor, 0, 0, size[0])


def _view(tensor: QuantizedTensor, size: list[int], *rest: Any, **more: Any) -> QuantizedTensor:
    if tensor.ndim > 1 and list(size) in ([-1], [tensor.numel()]):
        flat = tensor.map(torch.Tensor.detach)
        return FlatWeight(flat, shape=(tensor.numel(),), dtype=tensor.dtype, scheme=tensor.scheme)
    return handlers._same_view(tensor, size, *rest, **more)


def _copy_(target: Q, source: torch.Tensor, non_blocking: bool = False) -> Q:
    """A shard is portable where the weight's own layout has no rows."""
    if isinstance(source, QuantizedTensor) and type(source) is not type(target):
        source = source.portable()
    return handlers._copy_(target, source, non_blocking)


def _pad(tensor: QuantizedTensor, pad: Sequence[int], value: float = 0) -> QuantizedTensor:
    """More rows, as DTensor fills up a shard before it is sent."""
    more = pad[-1] if len(pad) == 2 * tensor.ndim else -1
    if more < 0 or any(pad[:-1]) or value:
        _refuse(tensor, f"aten.constant_pad_nd by {tuple(pad)}")

    def padded(leaf: torch.Tensor) -> torch.Tensor:
        return torch.cat((leaf, leaf.new_zeros(more, *leaf.shape[1:])))

    return _each(tensor, tensor.shape[0] + more, padded)


def _all_gather(tensor: QuantizedTensor, group_size: int, group_name: Any) -> QuantizedTensor:
    """The shards of all ranks below each other."""
    ops = torch.ops._c10d_functional
    if hasattr(ops, "_wrap_tensor_autograd"):  # of newer torch, and made when DTensor is imported
        HANDLERS[ops._wrap_tensor_autograd.default] = _waited

    def gathered(leaf: torch.Tensor) -> torch.Tensor:
        whole = ops.wait_tensor(ops.all_gather_into_tensor(row_bytes(leaf), group_size, group_name))
        return from_bytes(whole, leaf)

    return _each(tensor, tensor.shape[0] * group_size, gathered)


def _waited(tensor: QuantizedTensor) -> QuantizedTensor:
    """:func:`_all_gather` waits itself."""
    return tensor


def _sent_from_one_rank(outputs: Sequence[QuantizedTensor], *args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        f"{type(outputs[0]).__name__} can't be sent from one rank to the others. Quantize or load the same "
        "weight on every rank, which then cuts its own: distribute_tensor(..., src_data_rank=None)."
    )


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> NoReturn:
    """Of flat weights DistributedDataParallel makes the message that it sends to all ranks when it starts."""
    if any(isinstance(tensor, FlatWeight) for tensor in tensors):
        raise NotImplementedError(
            "quantized weights can't be sent from one rank to the others. Quantize or load the same ones "
            "on every rank: DistributedDataParallel(model, init_sync=False)."
        )
    refuse(next(type(tensor) for tensor in tensors if isinstance(tensor, QuantizedTensor)), aten.cat.default)


HANDLERS.update(
    {
        aten.new_zeros.default: _new(lambda leaf, size: leaf.new_zeros(size), "new_zeros"),
        aten.new_empty.default: _new(lambda leaf, size: leaf.new_empty(size), "new_empty"),
        aten.as_strided.default: _as_strided,
        aten.view.default: _view,
        aten.copy_.default: _copy_,
        aten.constant_pad_nd.default: _pad,
        aten.cat.default: _cat,
        aten._pin_memory.default: lambda tensor, device=None: tensor.map(torch.Tensor.pin_memory),
        aten.is_pinned.default: lambda tensor, device=None: all(
            data.is_pinned() for data in tensor.stored().values()
        ),
    }
)
if torch.distributed.is_available():
    HANDLERS[torch.ops._c10d_functional.all_gather_into_tensor.default] = _all_gather
    HANDLERS[torch.ops._c10d_functional.wait_tensor.default] = _waited
    HANDLERS[torch.ops.c10d.scatter_.default] = _sent_from_one_rank
    HANDLERS[torch.ops.c10d.broadcast_.default] = _sent_from_one_rank
