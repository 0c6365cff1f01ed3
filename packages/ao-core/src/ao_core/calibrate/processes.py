"""Several processes that calibrate together: which batches are whose, and what they tell each other.

Under ``torchrun`` each process holds the model and looks at a share of the batches. Everything goes through
``torch.distributed``; without it, or with one process, nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from ao_core.errors import OptionError

T = TypeVar("T")


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world() > 1 else 0


def share(batches: Sequence[T]) -> list[T]:
    """Every ``world()``-th batch, from this process's own.

    Raises:
        OptionError: there are fewer batches than processes.
    """
    if len(batches) < world():
        raise OptionError(
            f"{world()} processes were started for {len(batches)} batches; each needs one or more. Give "
            "more samples, smaller batches, or start fewer processes."
        )
    return list(batches[rank() :: world()])


def all_reduce(tensor: torch.Tensor, how: Literal["sum", "max"] = "sum") -> None:
    """Replace ``tensor`` by the sum or the maximum over all processes."""
    if world() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)


def total(count: int, device: torch.device) -> int:
    """The sum of a whole number over all processes."""
    if world() == 1:
        return count
    found = torch.tensor(count, dtype=torch.int64, device=device)
    dist.all_reduce(found)
    return int(found)


def gathered(value: T) -> list[T]:
    """A picklable value of each process, in the order of their ranks."""
    found: list[Any] = [value] * world()
    if world() > 1:
        dist.all_gather_object(found, value)
    return found


def broadcast(tensors: dict[str, torch.Tensor] | None, source: int, device: torch.device) -> Any:
    """The named tensors of process ``source``, on ``device``; the others pass None."""
    if world() == 1:
        return tensors
    outline: list[Any] = [None if tensors is None else {k: (t.shape, t.dtype) for k, t in tensors.items()}]
    dist.broadcast_object_list(outline, src=source)
    found: dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in outline[0].items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if tensors is not None:
            tensor.copy_(tensors[name])
        # As bytes: not every backend knows every dtype.
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=source)
        found[name] = tensor
    return found


@contextmanager
def started(device: torch.device) -> Iterator[torch.device]:
    """Inside the block, the processes that ``torchrun`` started know each other: NCCL, or gloo on a CPU.

    Yields the device of this process: of several GPUs the one that bears its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
