"""Measuring one scheme on one layer: time, relative output error, stored bytes."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ao_core import Scheme, microseconds, stored_bytes

_RING_BYTES = {"cuda": 200_000_000, "cpu": 40_000_000}  # of weights in turn: more than the caches hold
_MOST_COPIES = 40
_ROUND_US = 20_000.0  # of a round on a host, about
_REPLAYS_US = 20_000.0  # of the replays of a repeat, about
_REPEATS = 5
_ROWS = 2048  # of a weight, from which its error is taken
_LARGE = 1 << 23  # elements of a weight


@dataclass(frozen=True)
class Time:
    """Microseconds of a call.

    Attributes:
        us: the median of several measurements.
        spread: half the distance between the second lowest and the second highest of them.
    """

    us: float
    spread: float


@dataclass(frozen=True)
class Quality:
    """What a scheme does to a layer.

    Attributes:
        error: ``|y' - y| / |y|`` (Frobenius) of the outputs for the sampled inputs.
        bytes: that the weight takes.
    """

    error: float
    bytes: int


class FaultError(Exception):
    """A scheme that can't be measured here; the message says why."""


def quality(
    scheme: Scheme | None, weight: torch.Tensor, sample: torch.Tensor, bias: torch.Tensor | None
) -> tuple[Quality, torch.Tensor]:
    """Quantize ``weight`` ``[N, K]`` and compare outputs for ``sample`` ``[rows, K]``; also the weight.

    Without a scheme, of float.

    Raises:
        FaultError: the outputs have another shape or dtype, or hold NaN or infinity.
    """
    if scheme is None:
        return Quality(0.0, weight.nbytes), weight
    quantized = scheme.quantize(weight)
    exact = F.linear(sample, weight, bias)
    found = F.linear(sample, quantized, bias)
    if found.shape != exact.shape or found.dtype != exact.dtype:
        raise FaultError(
            f"its output is {found.dtype} {tuple(found.shape)}, not {exact.dtype} {tuple(exact.shape)}"
        )
    if not bool(torch.isfinite(found).all()):
        raise FaultError("its output holds NaN or infinity")
    return Quality(relative_error(exact, found), stored_bytes(quantized)), quantized


def quality_of_rows(
    scheme: Scheme, weight: torch.Tensor, sample: torch.Tensor, bias: torch.Tensor | None, stored: int
) -> Quality | None:
    """:func:`quality` from rows at even distances of a large ``weight``; None if that is not enough to go by.

    Args:
        scheme: one that quantizes each row by itself, else the result is None.
        weight: ``[N, K]``.
        sample: ``[rows, K]``.
        bias: ``[N]`` or None.
        stored: bytes that the whole weight takes.
    """
    step = len(weight) // _ROWS
    if not scheme.rowwise or weight.numel() < _LARGE or step < 2:
        return None
    part = None if bias is None else bias[::step]
    return Quality(quality(scheme, weight[::step].contiguous(), sample, part)[0].error, stored)


def relative_error(exact: torch.Tensor, found: torch.Tensor) -> float:
    """``|found - exact| / |exact|``, Frobenius norms in float64; 0 where both are 0."""
    off = float((found.double() - exact.double()).norm())
    size = float(exact.double().norm())
    return off / size if size else (0.0 if off == 0.0 else float("inf"))


def timed(
    weight: torch.Tensor,
    sample: torch.Tensor,
    rows: int,
    bias: torch.Tensor | None,
    *,
    compiled: bool = False,
) -> Time:
    """Time ``F.linear`` with ``weight``, float or quantized, on ``rows`` rows of the sampled inputs.

    Calls go through copies of the weight in turn, together larger than the caches, as layers do.
    On CUDA a graph of them is replayed.

    Args:
        weight: ``[N, K]``.
        sample: ``[r, K]``, repeated or cut to ``rows``.
        rows: of the activations.
        bias: ``[N]`` or None.
        compiled: time it as ``torch.compile`` makes it.
    """
    x = sample.repeat(-(-rows // len(sample)), 1)[:rows].contiguous()
    linear: Callable[..., torch.Tensor] = torch.compile(F.linear, dynamic=False) if compiled else F.linear
    with torch.no_grad():
        linear(x, weight, bias)  # kernels are compiled, and chosen, before anything counts
        room = _RING_BYTES.get(x.device.type, _RING_BYTES["cpu"]) // max(stored_bytes(weight), 1)
        if x.device.type != "cuda":
            once = microseconds([lambda: linear(x, weight, bias)], x.device, replays=2)
            room = min(room, int(_ROUND_US / max(once, 1e-3)))
        copies = [weight, *(weight.detach().clone() for _ in range(max(2, min(room, _MOST_COPIES)) - 1))]
        calls = [lambda each=each: linear(x, each, bias) for each in copies]
        replays = 2
        if x.device.type == "cuda":  # fewer of what is slow
            once = microseconds(calls, x.device, replays=1) * len(calls)
            replays = max(min(10, int(_REPLAYS_US / max(once, 1e-3))), 1)
        times = sorted(microseconds(calls, x.device, replays=replays) for _ in range(_REPEATS))
    return Time(statistics.median(times), (times[-2] - times[1]) / 2)


def digest(tensor: torch.Tensor | None) -> str:
    """A short text that changes with the values of ``tensor``; computed on its device, the same on each."""
    if tensor is None:
        return ""
    flat = tensor.detach().contiguous().reshape(-1)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size(), torch.uint8)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), 1 << 20):  # integers, which add up alike everywhere
        part = flat[start : start + (1 << 20)].view(words).to(torch.int64)
        place = torch.arange(start + 1, start + 1 + len(part), device=flat.device) * 0x9E3779B97F4A7C1 | 1
        total += torch.stack([((part + 1) * place).sum(), ((part ^ place) * (place >> 17 | 1)).sum()])
    return hashlib.sha256(repr((tuple(tensor.shape), total.tolist())).encode()).hexdigest()[:24]


def explained(error: BaseException) -> str:
    """The first line of an error, with its type."""
    if isinstance(error, FaultError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"it raises {type(error).__name__}: {lines[0] if lines else 'without a message'}"


def as_dict(found: Time | Quality) -> dict[str, Any]:
    """The numbers, JSON-able."""
    return dict(vars(found))
