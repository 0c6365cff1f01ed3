"""Choosing the parameters of a group without data: its range, the least squares, or half-quadratic.

Free functions on groups ``[..., N, G, g]`` of a weight in float32. A short last group is filled up by
repeating its own last value, so that it has no say beyond its own columns' range; where errors are
summed, the fill is left out by a mask. Parameters come back as they are stored: rounded to bfloat16, or in
float32 for a float32 weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ao_core.numerics import affine

ZeroPoint = Literal["float", "integer"] | None
Method = Literal["minmax", "mse", "hqq"]

QMAX = 15
MIDDLE = 8
"""The code that stands for zero where there is no integer zero point."""
_TINY = 1e-30
# A group that hardly varies: a bfloat16 midpoint is off by up to 2 ** -9 of itself, and codes must reach over
# that.
_FLAT = 2.0**-8
_IN_CACHE = 1 << 17


@dataclass(frozen=True)
class GroupParams:
    """``scale`` float ``[..., N, G]``; ``zero`` midpoints of that dtype, uint8 zero points, or None."""

    scale: Tensor
    zero: Tensor | None


def grouped(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """``[..., N, K]`` to float32 ``[..., N, G, g]``, and a mask ``[G, g]`` of what is really there."""
    columns = weight.shape[-1]
    size = columns if group_size == -1 else min(group_size, columns)
    groups = -(-columns // size)
    missing = groups * size - columns
    wide = weight.to(torch.float32)
    if missing:
        wide = torch.cat((wide, wide[..., -1:].expand(*wide.shape[:-1], missing)), -1)
    real = torch.arange(groups * size, device=weight.device) < columns
    return wide.reshape(*weight.shape[:-1], groups, size), real.view(groups, size)


def minmax(low: Tensor, high: Tensor, zero_point: ZeroPoint, dtype: torch.dtype) -> GroupParams:
    """Parameters in ``dtype`` whose 16 codes span ``[low, high]``, both ``[..., N, G]``.

    ``float``: ``scale = (high - low) / 15``, midpoint ``low + 8 * scale`` (tinygemm's convention).
    ``integer``: the range is widened to hold 0, which is then exact. None: ``absmax / 7.5``.
    """
    largest = torch.maximum(low.abs(), high.abs())
    if zero_point is None:
        return GroupParams((largest / 7.5).clamp_min_(_TINY).to(dtype), None)
    if zero_point == "integer":
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = ((high - low) / QMAX).clamp_min_(_TINY).to(dtype)
        zero = (-low / scale.float()).round_().clamp_(0, QMAX)
        return GroupParams(scale, zero.to(torch.uint8))
    scale = (torch.maximum(high - low, _FLAT * largest) / QMAX).clamp_min_(_TINY).to(dtype)
    return GroupParams(scale, (low + MIDDLE * scale.float()).to(dtype))


def encode(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Codes in [0, 15] as float32: the nearest to ``values``, whose shape the parameters broadcast to."""
    steps = values.to(torch.float32)
    if zero is not None and zero.is_floating_point():
        steps = (steps - zero.to(torch.float32)) / scale.to(torch.float32) + MIDDLE
        return steps.round_().clamp_(0, QMAX)
    codes = (steps / scale.to(torch.float32)).round_()
    codes += MIDDLE if zero is None else zero.to(torch.float32)
    return codes.clamp_(0, QMAX)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """What ``codes`` stand for, float32: ``(q - 8) * scale + zero``, or ``(q - zero) * scale``."""
    values = codes.to(torch.float32, copy=True)
    if zero is not None and not zero.is_floating_point():
        return values.sub_(zero).mul_(scale)
    values.sub_(MIDDLE).mul_(scale)
    return values if zero is None else values.add_(zero)


def by_column(
    scale: Tensor, zero: Tensor | None, columns: int, group_size: int
) -> tuple[Tensor, Tensor | None]:
    """Parameters of groups ``[..., G]`` as each column's own ``[..., columns]``; floats become float32.

    Raises:
        ValueError: they do not fit ``columns``.
    """
    wide = affine.expand_groups(scale.to(torch.float32), columns, group_size)
    if zero is None:
        return wide, None
    zero = zero.to(torch.float32) if zero.is_floating_point() else zero
    return wide, affine.expand_groups(zero, columns, group_size)


def exact_zero(params: GroupParams, pruned: Tensor | None) -> GroupParams:
    """Parameters of about the same range in which 0 is exact, where ``pruned`` ``[..., N, G]``.

    The midpoint becomes -4, -2, -1, 0, 1, 2, 4 or 8 times the scale, whichever holds the range in the
    smallest steps: powers of two, so that the product is exact in bfloat16 too. Integer zero points are exact
    as they are.
    """
    if pruned is None or params.zero is None or not params.zero.is_floating_point():
        return params
    zero, scale = params.zero.float(), params.scale.float()
    low, high = (zero - MIDDLE * scale).clamp_max_(0), (zero + (QMAX - MIDDLE) * scale).clamp_min_(0)
    smallest, steps = torch.full_like(scale, torch.inf), torch.zeros_like(scale)
    for power in (0, 1, -1, 2, -2, 4, -4, 8):
        code = MIDDLE - power  # the one that stands for 0
        below = -low / code if code else torch.where(low < 0, torch.inf, 0.0)
        needed = torch.maximum(below, high / (QMAX - code))
        steps = torch.where(needed < smallest, float(power), steps)
        smallest = torch.minimum(smallest, needed)
    scale = torch.where(pruned, smallest.clamp_min_(_TINY), scale).to(params.scale.dtype)
    return GroupParams(scale, torch.where(pruned, (steps * scale.float()).to(scale.dtype), params.zero))


def mse(
    groups: Tensor,
    real: Tensor,
    zero_point: ZeroPoint,
    dtype: torch.dtype,
    *,
    steps: int = 24,
    pruned: Tensor | None = None,
) -> GroupParams:
    """The range that leaves the least squared error, of ``steps`` ones down to half the full range.

    With a float midpoint the best is then refined by least squares: given the codes, scale and midpoint
    solve a regression; given these, the codes are the nearest; three times, kept where it is better.
    ``pruned``: see :func:`exact_zero`, which then holds for every candidate.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    cuts = [0.5 * step / steps for step in range(steps)]
    if zero_point == "float":
        less = (high - low) * _column([cut / 2 for cut in cuts], low)
        ends = less + low, high - less
    else:
        share = _column([1 - cut for cut in cuts], low)
        ends = low * share, high * share
    trials = exact_zero(minmax(*ends, zero_point, dtype), pruned)  # [steps, ..., G]
    errors = torch.stack([_squared_error(groups, real, _picked(trials, step)) for step in range(steps)])
    # The first of the least.
    numbers = torch.arange(steps, device=low.device).view(-1, *[1] * low.ndim)
    least = errors.amin(0)
    first = torch.where(errors == least, numbers, steps).amin(0, keepdim=True).remainder_(steps)
    best = GroupParams(
        trials.scale.gather(0, first)[0], None if trials.zero is None else trials.zero.gather(0, first)[0]
    )
    if zero_point == "float":
        for _ in range(3):
            trial = exact_zero(_regression(groups, real, best), pruned)
            best, least = _better(groups, real, trial, best, least)
    return best


def _column(values: list[float], like: Tensor) -> Tensor:
    """``values`` as float32, one for each on a new first dimension before those of ``like``."""
    return torch.tensor(values, device=like.device).view(-1, *[1] * like.ndim)


def _picked(params: GroupParams, index: int) -> GroupParams:
    return GroupParams(params.scale[index], None if params.zero is None else params.zero[index])


def hqq(
    groups: Tensor,
    real: Tensor,
    dtype: torch.dtype,
    *,
    lp_norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> GroupParams:
    """The midpoint that a half-quadratic solver finds for the range's scale: few large errors are forgiven.

    Minimizes ``|W - decode(encode(W))|_p`` with p < 1 by splitting off a sparse error ``E``: ``E`` is the
    shrunk residual, the midpoint is the mean of ``W - E`` less its steps. A group is done when it gains
    no more.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), eq. 1-5.
    """
    start = minmax(groups.amin(-1), groups.amax(-1), "float", dtype)
    scale = start.scale.float().unsqueeze(-1)
    zero = start.zero.float().unsqueeze(-1)  # type: ignore[union-attr]
    count = real.sum(-1, keepdim=True)
    best_zero, least = zero, torch.full_like(zero, torch.inf)
    gains = torch.ones_like(zero, dtype=torch.bool)
    for _ in range(iterations):
        levels = ((groups - zero) / scale).round_().clamp_(-MIDDLE, QMAX - MIDDLE) * scale
        residual = (groups - zero - levels) * real
        error = total(residual.abs()).unsqueeze(-1)
        gains = gains & (error < least)
        if not bool(gains.any()):
            break
        best_zero, least = torch.where(gains, zero, best_zero), torch.minimum(error, least)
        magnitude = residual.abs()
        shrunk = (magnitude - magnitude.clamp_min(1e-12).pow(lp_norm - 1) / beta).clamp_min_(0)
        sparse = shrunk * residual.sign()
        zero = total((groups - sparse - levels) * real).unsqueeze(-1) / count
        beta *= kappa
    return GroupParams(start.scale, best_zero.squeeze(-1).to(dtype))


def _better(
    groups: Tensor, real: Tensor, trial: GroupParams, best: GroupParams, least: Tensor
) -> tuple[GroupParams, Tensor]:
    """For each group the parameters with the smaller error, and that error."""
    error = _squared_error(groups, real, trial)
    wins = error < least
    scale = torch.where(wins, trial.scale, best.scale)
    zero = best.zero
    if trial.zero is not None and zero is not None:
        zero = torch.where(wins, trial.zero, zero)
    return GroupParams(scale, zero), torch.where(wins, error, least)


def _squared_error(groups: Tensor, real: Tensor, params: GroupParams) -> Tensor:
    scale = params.scale.unsqueeze(-1)
    zero = None if params.zero is None else params.zero.unsqueeze(-1)
    residual = decode(encode(groups, scale, zero), scale, zero).sub_(groups)
    return total(residual.mul_(residual).mul_(real))


def total(values: Tensor) -> Tensor:
    """The sum over the last dimension, to the last digit the same whatever the other dimensions are.

    Parameters of a row must not change with the rows beside it. CUDA's own sum adds in an order that depends
    on how many sums there are.
    """
    if values.device.type == "cpu":
        return values.sum(-1)
    while (size := values.shape[-1]) > 1:
        half = size // 2
        halves = values[..., :half] + values[..., half : 2 * half]
        values = halves if size % 2 == 0 else torch.cat((halves, values[..., -1:]), -1)
    return values.squeeze(-1)


def _regression(groups: Tensor, real: Tensor, params: GroupParams) -> GroupParams:
    """Scale and midpoint of the line through (code - 8, weight) with the least squares."""
    assert params.zero is not None
    steps = encode(groups, params.scale.unsqueeze(-1), params.zero.unsqueeze(-1)) - MIDDLE
    count = real.sum(-1)
    mean_step = total(steps * real) / count
    mean = total(groups * real) / count
    centred = (steps - mean_step.unsqueeze(-1)) * real
    spread = total(centred.square())
    slope = total(centred * groups) / spread.clamp_min(1e-12)
    scale = torch.where((spread > 0) & (slope > 0), slope, params.scale.float()).to(params.scale.dtype)
    return GroupParams(scale, (mean - scale.float() * mean_step).to(scale.dtype))


def choose(weight: Tensor, *, group_size: int, zero_point: ZeroPoint, method: Method) -> GroupParams:
    """Parameters of each group of ``weight`` ``[..., N, K]`` by ``method``; ``hqq`` has a float midpoint.

    In a group that holds zeros, as pruned weights do, 0 stays exact.

    Args:
        weight: float, ``[..., N, K]``.
        group_size: columns to a group, the last may be shorter; -1 for the whole row.
        zero_point: ``"float"``, ``"integer"`` or None: see :func:`minmax`.
        method: ``"minmax"``, ``"mse"`` or ``"hqq"``.
    """
    groups, real = grouped(weight, group_size)
    dtype = torch.float32 if weight.dtype == torch.float32 else torch.bfloat16
    pruned = ((groups == 0) & real).any(-1) if zero_point == "float" else None
    if pruned is not None and not bool(pruned.any()):
        pruned = None
    if method == "minmax":
        return exact_zero(minmax(groups.amin(-1), groups.amax(-1), zero_point, dtype), pruned)
    flat = groups.flatten(0, -3)  # [rows, G, g]
    # Both methods go over a group again and again: on a CPU it should stay in the cache.
    at_once = (
        max(_IN_CACHE // (flat.shape[1] * flat.shape[2]), 1) if weight.device.type == "cpu" else len(flat)
    )
    masks = [None] * len(flat) if pruned is None else pruned.flatten(0, -2).split(at_once)
    parts = [
        mse(part, real, zero_point, dtype, pruned=mask)
        if method == "mse"
        else exact_zero(hqq(part, real, dtype), mask)
        for part, mask in zip(flat.split(at_once), masks, strict=False)
    ]
    shape = groups.shape[:-1]
    zeros = [part.zero for part in parts if part.zero is not None]
    zero = torch.cat(zeros).view(shape) if zeros else None
    return GroupParams(torch.cat([part.scale for part in parts]).view(shape), zero)
