"""A linear whose weight is decoded to floats as it is needed: what torch computes where no kernel does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ao_core import Key

# Elements decoded at a time on a CPU: 4 MB of float32, however large the weight is.
_ELEMENTS = 1 << 20


def linear_by_rows(
    x: torch.Tensor, rows: int, bias: torch.Tensor | None, decode: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """``F.linear(x, weight, bias)`` with a weight decoded by ranges of rows on a CPU, at once elsewhere.

    Args:
        x: float ``[..., K]``.
        rows: N.
        bias: float ``[N]`` or None, rounded to the dtype of ``x``.
        decode: ``decode(part)`` gives the rows ``part`` of the weight, ``[part, K]`` in the dtype of ``x``.
    """
    added = None if bias is None else bias.to(x.dtype)
    at_once = max(_ELEMENTS // max(x.shape[-1], 1), 1) if x.device.type == "cpu" else rows
    if at_once >= rows:
        return F.linear(x, decode(slice(0, rows)), added)
    out = x.new_empty(*x.shape[:-1], rows)
    for start in range(0, rows, at_once):
        part = slice(start, min(start + at_once, rows))
        out[..., part] = F.linear(x, decode(part), None if added is None else added[part])
    return out


def linear_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` in float32 for a float32 weight, cast to the dtype of ``x`` once."""
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def check_packed_input(x: torch.Tensor, packed: torch.Tensor) -> None:
    """Raise RuntimeError unless ``x`` ``[..., K]`` may belong to 4-bit codes ``[N, ceil(K / 2)]``."""
    if -(-x.size(-1) // 2) != packed.size(1):
        most = 2 * packed.size(1)
        raise RuntimeError(
            f"a linear with {most - 1} or {most} input features was given an input {tuple(x.shape)}; "
            "its last dimension must match."
        )


def fake(x: torch.Tensor, codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Shape and dtype of the result: ``[..., N]`` for codes whose first dimension is N."""
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def rejects_device(key: Key) -> str | None:
    """Torch's operators are relied on for cpu and cuda."""
    if key.device.type not in ("cpu", "cuda"):
        return f"it runs on cpu and cuda, not on {key.device.type}"
    return None
