"""Sharded quantized weights: their plain tensors, and how FSDP2 gathers these when a layer runs.

What travels between the ranks is quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from ao_core.tensor.base import QuantizedTensor

Q = TypeVar("Q", bound=QuantizedTensor)


class Gathering(NamedTuple):
    """What a shard tells its other side: rows of the whole weight, and whether all shards have as many."""

    rows: int
    even: bool


def fsdp_pre_all_gather(
    shard: QuantizedTensor,
    mesh: Any,
    outer_size: torch.Size,
    outer_stride: tuple[int, ...],
    module: torch.nn.Module,
    mp_policy: Any,
) -> tuple[tuple[torch.Tensor, ...], Gathering]:
    """What this shard contributes to the whole weight of ``outer_size``: the bytes of its rows.

    Bytes, because not every backend knows every dtype. Where shards differ in size FSDP2 takes only tensors
    in the outer size of a full one: rows are laid out in so many of those, and may take up twice the room
    while they travel.
    """
    shards: int = mesh.size()
    parts = [row_bytes(leaf) for leaf in leaves_of(shard)]
    if outer_size[0] % shards == 0:
        return tuple(parts), Gathering(outer_size[0], even=True)
    rows, width = -(-outer_size[0] // shards), math.prod(outer_size[1:])
    own = torch.cat(parts, 1)  # [own rows, bytes of a row]
    laid = own.new_zeros(rows, -(-own.shape[1] // width) * width)
    laid[: own.shape[0], : own.shape[1]] = own
    inputs = tuple(part.contiguous().view(rows, *outer_size[1:]) for part in laid.split(width, 1))
    return inputs, Gathering(outer_size[0], even=False)


def fsdp_post_all_gather(
    shard: QuantizedTensor,
    all_gather_outputs: tuple[torch.Tensor, ...],
    metadata: Gathering,
    param_dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
) -> tuple[QuantizedTensor, tuple[torch.Tensor, ...]] | None:
    """The whole weight, from what all shards contributed.

    Args:
        shard: this rank's.
        all_gather_outputs: the inputs of all shards, each stacked along the first dimension.
        metadata: from :func:`fsdp_pre_all_gather`.
        param_dtype: of the result.
        out: the result of an earlier call, whose memory was freed since, to be filled again.

    Returns:
        The weight, and those of its tensors that are not ``all_gather_outputs`` themselves: FSDP2 frees
        and allocates them. None with ``out``.
    """
    leaves = leaves_of(shard)
    sizes = [_row_size(leaf) for leaf in leaves]
    parts: Sequence[torch.Tensor] = all_gather_outputs
    if not metadata.even:
        laid = torch.cat([part.flatten(1) for part in parts], 1)[: metadata.rows, : sum(sizes)]
        parts = [part.clone(memory_format=torch.contiguous_format) for part in laid.split(sizes, 1)]
    made = [from_bytes(part, leaf) for part, leaf in zip(parts, leaves, strict=True)]
    if out is None:
        whole = rebuilt(shard, iter(made), metadata.rows, param_dtype)
        return whole, () if metadata.even else tuple(parts)
    old: QuantizedTensor = getattr(out, "_local_tensor", out)  # type: ignore[arg-type]
    for leaf, part in zip(leaves_of(old), made, strict=True):
        if leaf.data_ptr() != part.data_ptr():  # they are all_gather_outputs themselves where it is the same
            leaf.copy_(part)
    return None


def _row_size(leaf: torch.Tensor) -> int:
    """Bytes of a row."""
    return math.prod(leaf.shape[1:]) * leaf.element_size()


def row_bytes(leaf: torch.Tensor) -> torch.Tensor:
    """``[n, ...]`` → uint8 ``[n, bytes of a row]``."""
    return leaf.contiguous().view(leaf.shape[0], math.prod(leaf.shape[1:])).view(torch.uint8)


def from_bytes(rows: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, bytes of a row]`` → ``[n, ...]`` like ``leaf``; the same memory."""
    return rows.view(leaf.dtype).view(rows.shape[0], *leaf.shape[1:])


def row_names(tensor: QuantizedTensor) -> tuple[str, ...]:
    """Names of the stored tensors that are cut with the rows."""
    return tensor.row_data if tensor.row_data is not None else tuple(tensor.stored())


def leaves_of(tensor: QuantizedTensor) -> list[torch.Tensor]:
    """The plain tensors that are cut with the rows, in order; those of inner quantized tensors too."""
    found: list[torch.Tensor] = []
    for name in row_names(tensor):
        data = getattr(tensor, name)
        if data is not None:
            found += leaves_of(data) if isinstance(data, QuantizedTensor) else [data]
    return found


def rebuilt(tensor: Q, leaves: Iterator[torch.Tensor], rows: int, dtype: torch.dtype | None = None) -> Q:
    """``tensor`` with other leaves, of ``rows`` rows."""

    def filled(data: torch.Tensor) -> torch.Tensor:
        return rebuilt(data, leaves, rows, dtype) if isinstance(data, QuantizedTensor) else next(leaves)

    return tensor.map(filled, only=row_names(tensor), shape=(rows, *tensor.shape[1:]), dtype=dtype)


for _method in (fsdp_pre_all_gather, fsdp_post_all_gather):  # FSDP2 finds them by these names
    setattr(QuantizedTensor, _method.__name__, _method)
