"""Masks: which weights of a matrix become zero, by their scores.

Free functions on one matrix ``[N, K]``. A mask is True where a weight becomes zero.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from ao_core import OptionError

Per = Literal["row", "layer"]


@dataclass(frozen=True)
class Level:
    """How many weights become zero, and among which the least are chosen.

    Attributes:
        sparsity: the share that becomes zero, in [0, 1).
        n: of n:m, how many of m neighbouring columns stay; 0 where the weights are unstructured.
        m: of n:m; 0 where the weights are unstructured.
        per: whether unstructured weights are compared within their row or over the whole matrix.

    Raises:
        OptionError: a number out of its range, or another word.
    """

    sparsity: float
    n: int = 0
    m: int = 0
    per: Per = "row"

    def __post_init__(self) -> None:
        number = isinstance(self.sparsity, (int, float)) and not isinstance(self.sparsity, bool)
        if not number or not 0 <= self.sparsity < 1:
            raise OptionError(
                f"sparsity is the share of weights that become zero, from 0 to below 1, and "
                f"{self.sparsity!r} was given."
            )
        if self.per not in get_args(Per):
            raise OptionError(f"weights are compared per row or per layer, and per={self.per!r} was given.")

    @classmethod
    def parse(cls, value: float | str, per: Per = "row") -> Level:
        """The level of a share such as ``0.5``, or of a pattern such as ``"2:4"``: 2 of 4 stay.

        Raises:
            OptionError: neither of the two, or out of range.
        """
        if not isinstance(value, str):
            return cls(value, per=per)
        if (found := re.fullmatch(r"\s*(\d+):(\d+)\s*", value)) is None:
            try:
                share = float(value)
            except ValueError:
                raise OptionError(
                    f"a level is a share such as 0.5 or a pattern such as 2:4, and {value!r} was given."
                ) from None
            return cls(share, per=per)
        n, m = int(found[1]), int(found[2])
        if not 1 <= n <= m:
            raise OptionError(
                f"pattern {n}:{m} keeps {n} of {m} neighbouring weights; that takes 1 <= n <= m, such as 2:4."
            )
        return cls((m - n) / m, n, m, per)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"{self.sparsity:g} per {self.per}"


def least(scores: torch.Tensor, level: Level) -> torch.Tensor:
    """The mask of the weights with the least ``scores`` ``[N, K]``, as ``level`` says.

    Unstructured: the ``floor(sparsity * K)`` least of each row, or the ``floor(sparsity * N * K)`` least
    of all. Of weights with equal scores the first becomes zero first. n:m: see :func:`least_of_groups`.
    """
    if level.m:
        return least_of_groups(scores, level.n, level.m)
    ranked = scores if level.per == "row" else scores.reshape(1, -1)
    count = quota(level.sparsity, ranked.shape[1])
    order = ranked.argsort(dim=-1, stable=True)[:, :count]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, order, value=True).view(scores.shape)


def least_of_groups(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """All but the ``n`` largest of each ``m`` neighbouring columns of ``scores`` ``[N, K]``.

    If m does not divide K, the columns that the last group lacks count as zeros: of its r columns
    ``min(n, r)`` stay.
    """
    columns = scores.shape[1]
    missing = -columns % m
    groups = F.pad(scores, (0, missing), value=-math.inf).view(scores.shape[0], -1, m)  # [N, G, m]
    order = groups.argsort(dim=-1, stable=True)[..., : m - n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, value=True)
    return mask.view(scores.shape[0], -1)[:, :columns]


def zeros_first(weight: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """``scores`` (0 or more) with -1 where ``weight`` is zero already: what is pruned is pruned first.

    So pruning a second time, by any scores, does not go beyond the level.
    """
    return scores.masked_fill(weight == 0, -1)


def quota(sparsity: float, count: int) -> int:
    """``floor(sparsity * count)``, as if ``sparsity`` were the decimal number that it is written as."""
    return math.floor(round(sparsity * count, 6))


def violations(weight: torch.Tensor, n: int, m: int) -> int:
    """Groups of ``m`` neighbouring columns of ``weight`` ``[..., N, K]`` with more than ``n`` non-zeros."""
    missing = -weight.shape[-1] % m
    used = F.pad(weight != 0, (0, missing)).unflatten(-1, (-1, m))  # [..., N, G, m]
    return int((used.sum(-1) > n).sum())
