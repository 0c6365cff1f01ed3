"""Several processes that calibrate together: which batches are whose, and what they tell each other.

Under ``torchrun`` each process holds the model and looks at a share of the batches. Everything goes through
``torch.distributed``, values as JSON; without it, or with one process, nothing here does anything.
"""

from __future__ import annotations

import json
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


def gathered(value: Any) -> list[Any]:
    """A JSON-able value of each process, in the order of their ranks; tuples come back as lists.

    Raises:
        TypeError: it is not JSON-able.
    """
    text = json.dumps(value).encode()
    if world() == 1:
        return [json.loads(text)]
    where = _device()
    sizes = [torch.zeros(1, dtype=torch.int64, device=where) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(text)], device=where))
    counts = [int(size) for size in sizes]
    own = torch.zeros(max(counts), dtype=torch.uint8)
    own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = [torch.empty_like(own, device=where) for _ in counts]
    dist.all_gather(texts, own.to(where))
    return [json.loads(bytes(each[:count].tolist())) for each, count in zip(texts, counts, strict=True)]


def broadcast(tensors: dict[str, torch.Tensor] | None, source: int, device: torch.device) -> Any:
    """The named tensors of process ``source``, on ``device``; the others pass None."""
    if world() == 1:
        return tensors
    outline = gathered(
        None
        if tensors is None
        else {k: (list(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in tensors.items()}
    )[source]
    found: dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in outline.items():
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        if tensors is not None:
            tensor.copy_(tensors[name])
        # As bytes: not every backend knows every dtype.
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=source)
        found[name] = tensor
    return found


def _device() -> torch.device:
    """Where the processes' backend takes tensors from."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


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
