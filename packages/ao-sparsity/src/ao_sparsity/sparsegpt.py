"""SparseGPT (arXiv 2301.00774): prune column by column, and let the later columns make up for what is lost.

Free functions on one matrix; names are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ao_core.numerics.hessian import inverse_factor
from ao_sparsity.masks import Level, least_of_groups, quota


@dataclass(frozen=True)
class Pruned:
    """What the loop gives for a weight ``[N, K]``.

    Attributes:
        weight: float32 ``[N, K]``, with zeros where ``mask``.
        mask: bool ``[N, K]``.
        percdamp: the damping that the factorization took: more than asked for where that was too little.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    percdamp: float


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    level: Level,
    *,
    percdamp: float = 0.01,
    block_size: int = 128,
) -> Pruned:
    """``weight`` with zeros, and with the other weights changed so that the output errs little.

    Masks are chosen as the columns are reached, by ``w² / [H⁻¹]_jj²`` of the weights as the errors before
    made them: of each m columns for n:m, of each ``block_size`` columns otherwise (section 3.3). Zeros that
    are there already stay, and count.

    Args:
        weight: float ``[N, K]``.
        hessian: ``2/n Σ x xᵀ``, float32 ``[K, K]``. Columns that no input reached have a zero on the
            diagonal, and become zero first.
        level: how much is pruned. ``per="layer"`` compares the rows of a block of columns with each other,
            as the paper does.
        percdamp: added to the diagonal, as a share of its mean; ten times as much is tried as long as
            there is no Cholesky factor.
        block_size: columns whose masks are chosen together, and whose errors are handed on together.

    Raises:
        ModelError: the Hessian has no factor with ten times its mean diagonal added.
    """
    w, h = weight.to(torch.float32, copy=True), hessian.to(torch.float32, copy=True)
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0 if bool(dead.all()) else h.diagonal()[~dead].mean()
    hinv, percdamp = inverse_factor(h, percdamp)
    del h
    there = w == 0
    mask, step = there.clone(), block_size
    if level.m:
        step = max(block_size // level.m, 1) * level.m  # whole groups
    for start in range(0, w.shape[1], step):
        end = min(start + step, w.shape[1])
        span, u, own = w[:, start:end].clone(), hinv[start:end, start:end], mask[:, start:end]
        scores_of = _Scores(u.diagonal(), dead[start:end])
        if not level.m:
            own |= _least_of_span(scores_of(span, 0), there, start, end, level)
        errors = torch.empty_like(span)
        for i in range(end - start):
            if level.m and i % level.m == 0:
                group = slice(i, i + level.m)
                scores = scores_of(span[:, group], i).masked_fill(own[:, group], -1)
                own[:, group] |= least_of_groups(scores, level.n, level.m)
            kept = span[:, i].masked_fill(own[:, i], 0)
            errors[:, i] = (span[:, i] - kept) / u[i, i]
            span[:, i:].addr_(errors[:, i], u[i, i:], alpha=-1)
            span[:, i] = kept
        w[:, start:end] = span
        w[:, end:].addmm_(errors, hinv[start:end, end:], alpha=-1)
    return Pruned(w, mask, percdamp)


@dataclass(frozen=True)
class _Scores:
    """``w² / [H⁻¹]_jj²`` of some columns: the error of pruning a weight and making up for it (equation 3)."""

    diagonal: torch.Tensor  # of the factor: its squares are [H⁻¹]_jj of the columns that are left
    dead: torch.Tensor

    def __call__(self, columns: torch.Tensor, first: int) -> torch.Tensor:
        here = slice(first, first + columns.shape[1])
        scores = columns.square() / self.diagonal[here].square()
        return scores.masked_fill(self.dead[here], 0)


def _least_of_span(
    scores: torch.Tensor, there: torch.Tensor, start: int, end: int, level: Level
) -> torch.Tensor:
    """The mask of the columns from ``start`` to ``end``, in addition to the zeros that are ``there``.

    What is to be pruned beyond those zeros is spread over the columns like the weights that are left, so
    that the level is met by the whole and by no block alone.
    """
    if level.per == "layer":
        scores, there = scores.reshape(1, -1), there.t().reshape(1, -1)  # column by column
        rows = scores.shape[1] // (end - start)
        start, end = start * rows, end * rows
    left = ~there
    total = left.sum(-1)
    more = (quota(level.sparsity, there.shape[1]) - (there.shape[1] - total)).clamp_min(0)
    before, after = (
        (more.double() * left[:, :column].sum(-1) / total.clamp_min(1)).add(1e-9).floor()
        for column in (start, end)
    )
    here = there[:, start:end] if level.per == "row" else _by_row(there[:, start:end], rows)
    ranks = scores.masked_fill(here, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
    mask = (ranks < (after - before)[:, None]) & ~here
    return mask if level.per == "row" else mask.view(rows, -1)


def _by_row(flat: torch.Tensor, rows: int) -> torch.Tensor:
    """``[1, C * N]``, column by column, as ``[1, N * C]``, row by row."""
    return flat.view(-1, rows).t().reshape(1, -1)
