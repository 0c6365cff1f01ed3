"""Several processes that calibrate together: which batches are whose, and what they tell each other.

Under ``torchrun`` each process holds the model and looks at a share of the batches. Everything goes through
``torch.distributed``, values as JSON; without it, or with one process, nothing here does anything.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from ao_core.errors import OptionError

T = TypeVar("T")
_ALIGNED = 16  # bytes: tensors of any dtype may begin there


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


def outline(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Shapes and dtypes, JSON-able: what :func:`broadcast` must know beforehand."""
    return {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()}


def broadcast(
    tensors: Mapping[str, torch.Tensor] | None,
    source: int,
    device: torch.device,
    shapes: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """The named tensors of process ``source``, on ``device``, sent at once.

    Args:
        tensors: what ``source`` sends; the others pass None.
        source: the rank of the process that has them.
        device: where they are to lie.
        shapes: from :func:`outline` on ``source``, where all know it already; asked for otherwise.
    """
    if world() == 1:
        return dict(tensors or {})
    if shapes is None:
        shapes = gathered(None if tensors is None else outline(tensors))[source]
        assert shapes is not None
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name, (shape, dtype) in shapes.items():
        start = -(-end // _ALIGNED) * _ALIGNED
        end = start + math.prod(shape) * getattr(torch, dtype).itemsize
        places[name] = (start, end)
    # As bytes: not every backend knows every dtype.
    flat = torch.zeros(end, dtype=torch.uint8, device=device)
    found = {
        name: flat[slice(*places[name])].view(getattr(torch, dtype)).view(shape)
        for name, (shape, dtype) in shapes.items()
    }
    if tensors is not None:
        for name, tensor in found.items():
            tensor.copy_(tensors[name])
    dist.broadcast(flat, src=source)
    return {name: tensor.clone() for name, tensor in found.items()}  # none holds the others' bytes


def _device() -> torch.device:
    """Where the processes' backend takes tensors from."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def connected(device: torch.device) -> int:
    """Let all processes meet once, which opens their connections; how many they are."""
    return total(1, device)


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
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        connected(device)
        yield device
    finally:
        dist.destroy_process_group()
