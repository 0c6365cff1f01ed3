"""Measuring one scheme on one layer: time, relative output error, stored bytes."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from ao_core import Rounds, Scheme, microseconds, stored_bytes

_RING_BYTES = {"cuda": 200_000_000, "cpu": 40_000_000}  # of weights in turn: more than the caches hold
_MOST_COPIES = 40
_ROUND_US = 20_000.0  # of a round on a host, about
_REPLAYS_US = 20_000.0  # of the replays of a repeat, about
_REPEATS = 5
_ROWS = 1024  # of a large weight, from which its error is taken
_LARGE = 1 << 20  # elements of a weight


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


class EndedError(FaultError):
    """The process that it was measured in ended, or was ended since it took too long (``hung``)."""

    def __init__(self, message: str, *, hung: bool) -> None:
        super().__init__(message)
        self.hung = hung


@dataclass(frozen=True)
class Part:
    """Rows of a weight that stand for all of it.

    Attributes:
        rows: which.
        counts: for how many each of them stands.
    """

    rows: torch.Tensor
    counts: torch.Tensor


@dataclass(eq=False)
class Reference:
    """A linear in float, which candidates are compared with; what all comparisons share is made once.

    Attributes:
        weight: ``[N, K]``.
        sample: of its inputs, ``[r, K]``.
        bias: ``[N]`` or None.
    """

    weight: torch.Tensor
    sample: torch.Tensor
    bias: torch.Tensor | None

    @cached_property
    def output(self) -> torch.Tensor:
        """``[r, N]``."""
        return F.linear(self.sample, self.weight, self.bias)

    @cached_property
    def size(self) -> torch.Tensor:
        """Of the output, squared, in float64."""
        return self.output.double().square().sum()

    @cached_property
    def part(self) -> Part | None:
        """Of ``_ROWS`` rows half are those of the largest norm, half others, by norm at even distances.

        What a scheme does to a row grows with the row, and outliers may hold most of the error: these count
        themselves. None of a weight that is not large.
        """
        half = _ROWS // 2
        if self.weight.numel() < _LARGE or len(self.weight) < 2 * _ROWS:
            return None
        order = torch.linalg.vector_norm(self.weight, dim=-1, dtype=torch.float32).argsort(stable=True)
        others, largest = order[:-half], order[-half:]  # from the smallest on
        spread = torch.linspace(0, len(others) - 1, half, dtype=torch.float64, device=order.device)
        counts = torch.ones(_ROWS, dtype=torch.float64, device=order.device)
        counts[:half] = len(others) / half
        return Part(torch.cat([others[spread.round().long()], largest]), counts)


def quality(scheme: Scheme | None, reference: Reference) -> tuple[Quality, torch.Tensor]:
    """Quantize the weight and compare outputs for the sample; also the weight. Without a scheme, of float.

    Raises:
        FaultError: the outputs have another shape or dtype, or hold NaN or infinity.
    """
    if scheme is None:
        return Quality(0.0, reference.weight.nbytes), reference.weight
    quantized = scheme.quantize(reference.weight)
    found = F.linear(reference.sample, quantized, reference.bias)
    off = comparable(found, reference.output).double() - reference.output.double()
    return Quality(_ratio(off.square().sum(), reference.size), stored_bytes(quantized)), quantized


def quality_of_rows(scheme: Scheme, reference: Reference, stored: int) -> Quality | None:
    """:func:`quality` from about ``_ROWS`` rows of a large weight; None if that is not enough to go by.

    Args:
        scheme: one that quantizes each row by itself, else the result is None.
        reference: the layer.
        stored: bytes that the whole weight takes.
    """
    part = reference.part if scheme.rowwise else None
    if part is None:
        return None
    bias = None if reference.bias is None else reference.bias[part.rows]
    exact = reference.output[..., part.rows]
    found = F.linear(reference.sample, scheme.quantize(reference.weight[part.rows]), bias)
    off = comparable(found, exact).double() - exact.double()
    return Quality(_ratio((off.square() * part.counts).sum(), reference.size), stored)


def comparable(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """``found`` if it can be compared with ``exact``; its values are looked at when they are read anyway.

    Raises:
        FaultError: it has another shape or dtype.
    """
    if found.shape != exact.shape or found.dtype != exact.dtype:
        raise FaultError(
            f"its output is {found.dtype} {tuple(found.shape)}, not {exact.dtype} {tuple(exact.shape)}"
        )
    return found


def _ratio(off: torch.Tensor, size: torch.Tensor) -> float:
    """The root of ``off / size``; 0 where both are 0. Both are read from the device at once."""
    wrong, whole = torch.stack([off, size]).tolist()
    if not math.isfinite(whole):
        raise FaultError("the layer's output in float holds NaN or infinity")
    if not math.isfinite(wrong):
        raise FaultError("its output holds NaN or infinity")
    if not whole:
        return 0.0 if wrong == 0.0 else float("inf")
    return math.sqrt(wrong / whole)


def relative_error(exact: torch.Tensor, found: torch.Tensor) -> float:
    """``|found - exact| / |exact|``, Frobenius norms in float64; 0 where both are 0.

    Raises:
        FaultError: the outputs have another shape or dtype, or ``found`` holds NaN or infinity.
    """
    off = comparable(found, exact).double() - exact.double()
    return _ratio(off.square().sum(), exact.double().square().sum())


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
    linear, x = called(weight, sample, rows, bias, compiled=compiled)
    with torch.no_grad():
        room = _RING_BYTES.get(x.device.type, _RING_BYTES["cpu"]) // max(stored_bytes(weight), 1)
        if x.device.type != "cuda":
            once = microseconds([lambda: linear(x, weight, bias)], x.device, replays=2)
            room = min(room, int(_ROUND_US / max(once, 1e-3)))
        copies = [weight, *(weight.detach().clone() for _ in range(max(2, min(room, _MOST_COPIES)) - 1))]
        calls = [lambda each=each: linear(x, each, bias) for each in copies]
        rounds = Rounds(calls, x.device)
        replays = 2
        if x.device.type == "cuda":  # fewer of what is slow
            once = rounds.typical(1) * len(copies)
            replays = max(min(10, int(_REPLAYS_US / max(once, 1e-3))), 1)
        times = sorted(rounds.typical(replays) for _ in range(_REPEATS))
    return Time(statistics.median(times), (times[-2] - times[1]) / 2)


def called(
    weight: torch.Tensor,
    sample: torch.Tensor,
    rows: int,
    bias: torch.Tensor | None,
    *,
    compiled: bool = False,
) -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
    """The linear and the input that :func:`timed` times, called once: kernels are compiled, and chosen."""
    x = sample.repeat(-(-rows // len(sample)), 1)[:rows].contiguous()
    linear: Callable[..., torch.Tensor] = torch.compile(F.linear, dynamic=False) if compiled else F.linear
    with torch.no_grad():
        linear(x, weight, bias)
    return linear, x


def digest(tensor: torch.Tensor | None) -> str:
    """A short text that changes with the values of ``tensor``; computed on its device, the same on each."""
    if tensor is None:
        return ""
    flat = tensor.detach().contiguous().reshape(-1)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size(), torch.uint8)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    step = 1 << 22 if flat.is_cuda else 1 << 20
    for start in range(0, flat.numel(), step):  # integers, which add up alike everywhere
        part = flat[start : start + step].view(words).to(torch.int64)
        place = torch.arange(start + 1, start + 1 + len(part), device=flat.device) * 0x9E3779B97F4A7C1 | 1
        total += torch.stack([((part + 1) * place).sum(), ((part ^ place) * (place >> 17 | 1)).sum()])
    return hashlib.sha256(repr((tuple(tensor.shape), total.tolist())).encode()).hexdigest()[:24]


class Digests:
    """:func:`digest` of tensors that do not change meanwhile, each read once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[torch.Tensor, str]] = {}

    def __call__(self, tensor: torch.Tensor) -> str:
        """The tensor's digest; the tensor is held, so that no other one gets its identity."""
        if id(tensor) not in self._known:
            self._known[id(tensor)] = tensor, digest(tensor)
        return self._known[id(tensor)][1]


def explained(error: BaseException) -> str:
    """The first line of an error, with its type."""
    if isinstance(error, FaultError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"it raises {type(error).__name__}: {lines[0] if lines else 'without a message'}"


def as_dict(found: Time | Quality) -> dict[str, Any]:
    """The numbers, JSON-able."""
    return dict(vars(found))
