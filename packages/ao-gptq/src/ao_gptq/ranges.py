"""Group parameters for the column loop: the scheme's own, or multiples that err less where it counts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ao_core import QParams, Scheme

# Of the scheme's own range; those of schemes that search themselves are near the best already.
_FACTORS = tuple(step / 100 for step in range(64, 116, 4))
_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 24}  # at a time: on a GPU, enough to fill it


@dataclass(frozen=True)
class Chosen:
    """Group parameters: those to round with, and what the scheme gives by itself."""

    qparams: QParams
    own: QParams


def choose(
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    scheme: Scheme,
    rows: Sequence[int],
    size: int,
) -> Chosen:
    """Parameters for columns of several weights that lie below each other.

    Args:
        weight: ``[..., N, C]``, whole groups (the last may be shorter), in the dtype that is quantized.
        importance: how much an error in each column counts, ``[..., 1, C]``: the square root of the mean
            squared input is a good choice. Of some multiples of the scheme's own range the one with the
            least squared error so weighted is taken, for each row and group. None: the scheme's own.
        scheme: what chooses.
        rows: how many belong to each weight; sums to N. Each is chosen for alone.
        size: columns to a group.
    """
    elements = _ELEMENTS.get(weight.device.type, _ELEMENTS["cpu"])
    step = max(elements // max(weight[..., :1, :].numel(), 1), 1)
    parts = [
        scheme.choose_qparams(piece)
        for part in weight.split(list(rows), -2)
        for piece in (part.split(step, -2) if scheme.rowwise else (part,))
    ]
    own = {name: torch.cat([part[name] for part in parts], -2) for name in parts[0]}
    if importance is None or not scales(scheme) or any(map(_one_for_all, parts)):
        return Chosen(own, own)
    found = [
        _searched(
            weight[..., start : start + step, :],
            importance,
            scheme,
            {name: value[..., start : start + step, :] for name, value in own.items()},
            size,
        )
        for start in range(0, weight.shape[-2], step)
    ]
    return Chosen({name: torch.cat([part[name] for part in found], -2) for name in own}, own)


def _one_for_all(qparams: QParams) -> bool:
    """Whether all rows of a weight share their parameters, as with one scale for a tensor."""
    return all(value.shape[-2] > 1 and bool((value == value[..., :1, :]).all()) for value in qparams.values())


def _searched(
    weight: torch.Tensor, importance: torch.Tensor, scheme: Scheme, own: QParams, size: int
) -> QParams:
    best = dict(own)
    least = _error(weight, importance, scheme, own, size)
    for factor in _FACTORS:
        trial = scaled(own, factor)
        error = _error(weight, importance, scheme, trial, size)
        wins = error < least
        best = {name: torch.where(wins, trial[name], value) for name, value in best.items()}
        least = torch.minimum(error, least)
    return best


def _error(
    weight: torch.Tensor, importance: torch.Tensor, scheme: Scheme, qparams: QParams, size: int
) -> torch.Tensor:
    """Weighted squared error of each row and group, ``[..., N, G]``."""
    wrong = scheme.decode(scheme.encode(weight, qparams), qparams).sub_(weight).square_().mul_(importance)
    columns = wrong.shape[-1]
    groups = -(-columns // size)
    if columns % size:
        wrong = torch.nn.functional.pad(wrong, (0, groups * size - columns))
    summed: torch.Tensor = wrong.unflatten(-1, (groups, size)).sum(-1)
    return summed


def scaled(qparams: QParams, factor: float) -> QParams:
    """Float parameters times ``factor``; integers, such as zero points, as they are."""
    return {
        name: (value * factor).to(value.dtype) if value.is_floating_point() else value
        for name, value in qparams.items()
    }


@functools.lru_cache(maxsize=64)
def scales(scheme: Scheme) -> bool:
    """Whether what codes stand for grows with the float parameters, as with a scale and a midpoint."""
    size = 32 if scheme.group_columns == -1 else scheme.group_columns
    weight = torch.randn(8, min(size, 256), generator=torch.Generator().manual_seed(0)) + 0.1
    qparams = scheme.choose_qparams(weight)
    codes = scheme.encode(weight, qparams)
    grown = scheme.decode(codes, scaled(qparams, 1.25))
    return torch.allclose(grown, 1.25 * scheme.decode(codes, qparams), rtol=2e-2, atol=1e-6)
