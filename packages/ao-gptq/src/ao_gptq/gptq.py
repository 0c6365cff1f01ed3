"""GPTQ (arXiv 2210.17323): round a weight column by column, and let the later columns make up for each error.

Free functions on a matrix or a stack of them. The scheme says what a column becomes (``encode`` and
``decode`` with the parameters of its group): integers, code books and floats go through the same loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ao_core import QParams, Scheme
from ao_gptq import columns as column_ops
from ao_gptq.factor import Factor
from ao_gptq.ranges import Chosen, choose


@dataclass(frozen=True)
class Rounded:
    """What the loop gives for a weight ``[..., N, K]``.

    Attributes:
        codes: ``[..., N, K]``.
        qparams: each ``[..., N, G]``.
        own: of static groups, what the scheme gives for the weight by itself; else None.
    """

    codes: torch.Tensor
    qparams: QParams
    own: QParams | None = None


def gptq(
    weight: torch.Tensor,
    factors: Factor | Sequence[Factor],
    scheme: Scheme,
    *,
    block_size: int = 128,
    static_groups: bool = False,
    mse: bool = False,
    rows: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    zeros: torch.Tensor | None = None,
) -> Rounded:
    """Codes for ``weight`` whose outputs err little on the inputs that ``factors`` were made of.

    Args:
        weight: float ``[N, K]``, or a stack ``[B, N, K]``.
        factors: of the Hessian, or one for each matrix of the stack.
        scheme: what the weight is to become.
        block_size: columns whose errors are handed on together (lazy batch updates, section 3.3).
        static_groups: fix the parameters of all groups before the first column; otherwise a group's are
            chosen when its first column is reached, from what the errors before it made of the group.
            Where factors are in another order than the weight's they are always static: groups keep their
            neighbouring columns, and so the packed layout.
        mse: search multiples of the scheme's own parameters: see :func:`ao_gptq.ranges.choose`.
        rows: where several weights lie below each other, how many belong to each: their parameters are
            chosen for each alone.
        dtype: that the scheme is to find parameters for; by default the weight's.
        zeros: bool of the weight's shape: what was pruned stays zero, whatever errors are handed on.
    """
    stack = weight if weight.ndim == 3 else weight.unsqueeze(0)  # [B, N, K]
    made = [factors] if isinstance(factors, Factor) else list(factors)
    pruned = None if zeros is None else zeros.view(stack.shape)
    found = _Loop(
        stack, made, scheme, mse, list(rows or [stack.shape[1]]), dtype or weight.dtype, pruned
    ).run(block_size, static_groups or not all(each.plain for each in made))
    if weight.ndim == 3:
        return found
    own = None if found.own is None else {name: value[0] for name, value in found.own.items()}
    return Rounded(found.codes[0], {name: value[0] for name, value in found.qparams.items()}, own)


class _Loop:
    """The state of one run over the columns of ``[B, N, K]``."""

    def __init__(
        self,
        weight: torch.Tensor,
        factors: Sequence[Factor],
        scheme: Scheme,
        mse: bool,
        rows: list[int],
        dtype: torch.dtype,
        zeros: torch.Tensor | None,
    ) -> None:
        self.weight, self.scheme, self.rows, self.dtype = weight, scheme, rows, dtype
        self.columns = weight.shape[-1]
        self.size = self.columns if scheme.group_columns == -1 else min(scheme.group_columns, self.columns)
        self.upper = _stacked([each.upper for each in factors])  # [B, K, K]
        order = torch.stack([each.order for each in factors])  # [B, K]
        self.order = None if all(each.plain for each in factors) else order
        importance = torch.stack([each.importance for each in factors]).unsqueeze(1)  # [B, 1, K]
        self.importance = importance.sqrt() if mse else None
        fast = zeros is None and column_ops.accelerated(weight.device)
        self.levels = column_ops.levels_of(scheme) if fast else None
        self.table: tuple[QParams, torch.Tensor] | None = None
        wide = weight.to(torch.float32, copy=True)
        self.w = wide if self.order is None else wide.gather(2, self._wide(self.order, wide))
        self.zeros = zeros
        if zeros is not None:
            self.weight = weight.masked_fill(zeros, 0)
            if self.order is not None:
                self.zeros = zeros.gather(2, self._wide(self.order, zeros))

    def run(self, block_size: int, static: bool) -> Rounded:
        """See :func:`gptq`."""
        whole = self._choose(self.weight, 0, self.columns) if static else None
        chosen = [] if whole is None else [whole.qparams]
        codes: list[torch.Tensor] = []
        for start, end in _spans(self.columns, self.columns if static else self.size, block_size):
            span = self.w[:, :, start:end].clone()
            errors = torch.empty_like(span)
            for first, last in self._runs(start, end, static):
                inside = slice(first - start, last - start)
                if not static and first % self.size == 0:  # the group lies in this span, or starts with it
                    stop = min(first + self.size, self.columns)
                    group = span[..., inside] if stop <= end else self.w[..., first:stop]
                    if self.zeros is not None:
                        group = group.masked_fill(self.zeros[..., first:stop], 0)
                    chosen.append(self._choose(group, first, stop).qparams)
                groups = self._groups(first, last, static)
                found, errors[..., inside] = self._round(
                    span[..., inside],
                    self.upper[:, first:last, first:last],
                    chosen[0 if static else -1],
                    groups,
                    None if self.zeros is None else self.zeros[..., first:last],
                )
                codes.append(found)
                if last < end:
                    later = self.upper[:, first:last, last:end]
                    span[..., last - start :].baddbmm_(errors[..., inside], later, alpha=-1)
            if end < self.columns:
                self.w[..., end:].baddbmm_(errors, self.upper[:, start:end, end:], alpha=-1)
        whole_codes = torch.cat(codes, -1)
        if self.order is not None:
            place = self._wide(self.order, whole_codes)
            whole_codes = torch.empty_like(whole_codes).scatter_(2, place, whole_codes)
        qparams = {name: torch.cat([each[name] for each in chosen], -1) for name in chosen[0]}
        return Rounded(whole_codes, qparams, None if whole is None else whole.own)

    def _choose(self, weight: torch.Tensor, first: int, last: int) -> Chosen:
        importance = None if self.importance is None else self.importance[..., first:last]
        return choose(weight.to(self.dtype), importance, self.scheme, self.rows, self.size)

    def _runs(self, start: int, end: int, static: bool) -> Iterator[tuple[int, int]]:
        """Parts of a span that can be rounded in one go: all of it, or a group."""
        step = end - start if static else min(self.size, end - start)
        for first in range(start, end, step):
            yield first, min(first + step, end)

    def _groups(self, first: int, last: int, static: bool) -> torch.Tensor:
        """Which of the chosen groups columns ``first`` to ``last`` belong to, int64 ``[B, C]``."""
        if not static:
            return torch.zeros(len(self.w), last - first, dtype=torch.int64, device=self.w.device)
        if self.order is None:
            place = torch.arange(first, last, device=self.w.device).expand(len(self.w), -1)
        else:
            place = self.order[:, first:last]
        return place // self.size

    def _round(
        self,
        span: torch.Tensor,
        upper: torch.Tensor,
        qparams: QParams,
        groups: torch.Tensor,
        zeros: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[B, N, C]`` and errors float32 ``[B, N, C]`` of some columns; ``upper`` ``[B, C, C]``."""
        if self.levels is None:
            return column_ops.rounded_by_scheme(span, upper, self.scheme, qparams, groups, zeros)
        if self.table is None or self.table[0] is not qparams:
            self.table = (qparams, column_ops.table_of(self.scheme, qparams, self.levels))
        return column_ops.rounded(span, upper, self.table[1], groups, self.levels)

    @staticmethod
    def _wide(order: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """``[B, K]`` as the index ``[B, N, K]``."""
        return order.unsqueeze(1).expand(like.shape)


def _stacked(uppers: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[B, K, K]`` without a copy of a single one."""
    return uppers[0].unsqueeze(0) if len(uppers) == 1 else torch.stack(list(uppers))


def _spans(columns: int, size: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Blocks of columns that hold whole groups, or lie inside one and begin with it."""
    outer = max(block_size // size, 1) * size
    for start in range(0, columns, outer):
        end = min(start + outer, columns)
        step = outer if size <= block_size else block_size
        for first in range(start, end, step):
            yield first, min(first + step, end)
