"""GPTQ (arXiv 2210.17323): round a weight column by column, and let the later columns make up for each error.

Free functions on one matrix. The scheme says what a column becomes (``encode`` and ``decode`` with the
parameters of its group), so that integers, code books and floats go through the same loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ao_core import ModelError, QParams, Scheme

_LARGEST_DAMP = 10.0


@dataclass(frozen=True)
class Rounded:
    """What the loop gives for a weight ``[N, K]``.

    Attributes:
        codes: ``[N, K]``.
        qparams: each ``[N, G]``.
        percdamp: the damping that the factorization took: more than asked for where that was too little.
    """

    codes: torch.Tensor
    qparams: QParams
    percdamp: float


def inverse_factor(hessian: torch.Tensor, percdamp: float) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the damped Hessian's inverse (step 3 of section 3.3).

    Args:
        hessian: float32 ``[K, K]``, symmetric, no zero on its diagonal.
        percdamp: what is added to the diagonal, as a share of its mean. Ten times as much is tried as
            long as the factorization fails.

    Returns:
        The factor ``[K, K]``, and the share that was added.

    Raises:
        ModelError: it fails with ten times the diagonal's mean: the Hessian is no sum of squares.
    """
    mean = hessian.diagonal().mean()
    while percdamp <= _LARGEST_DAMP:
        damped = hessian.clone()
        damped.diagonal().add_(percdamp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper, percdamp
        percdamp = max(10 * percdamp, 1e-4)
    raise ModelError(
        f"the Hessian {tuple(hessian.shape)} has no Cholesky factor, even with {_LARGEST_DAMP:g} times its "
        "mean diagonal added. Look for NaN or infinity in the calibration inputs."
    )


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: Scheme,
    *,
    percdamp: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
    zeros: torch.Tensor | None = None,
) -> Rounded:
    """Codes for ``weight`` whose outputs err little on the inputs that ``hessian`` was made of.

    Args:
        weight: float ``[N, K]``.
        hessian: ``2/n Σ x xᵀ``, float32 ``[K, K]``. Columns that no input reached have a zero on the
            diagonal; they are rounded to the nearest.
        scheme: what the weight is to become.
        percdamp: see :func:`inverse_factor`.
        block_size: columns whose errors are handed on together (lazy batch updates, section 3.3).
        act_order: columns with the largest inputs first. Groups keep their neighbouring columns, and so
            the packed layout; their parameters are then those of the weight as it was.
        static_groups: fix all parameters before the first column; otherwise a group's are chosen when
            its first column is reached, from what the errors before it made of the group.
        zeros: bool ``[N, K]``: weights that were pruned and stay zero, whatever errors are handed on to them.

    Raises:
        ModelError: see :func:`inverse_factor`.
    """
    columns = weight.shape[1]
    size = columns if scheme.group_columns == -1 else min(scheme.group_columns, columns)
    w, h = weight.to(torch.float32, copy=True), hessian.to(torch.float32, copy=True)
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0 if bool(dead.all()) else h.diagonal()[~dead].mean()
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else None
    place = torch.arange(columns).tolist() if order is None else order.tolist()
    static = static_groups or order is not None
    chosen = _split(scheme.choose_qparams(weight), -(-columns // size)) if static else []
    if order is not None:
        w, h = w[:, order], h[order][:, order]
        zeros = None if zeros is None else zeros[:, order]
    factor, percdamp = inverse_factor(h, percdamp)
    del h
    codes: list[torch.Tensor] = [torch.empty(0)] * columns
    for start, end in _spans(columns, columns if static else size, block_size):
        span, u = w[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.empty_like(span)
        for i, column in enumerate(range(start, end)):
            if not static and column % size == 0:  # the group lies in this span, or starts with it
                group = _group(w, span, start, column, size)
                if zeros is not None:
                    group = group.masked_fill(zeros[:, column : column + size], 0)
                chosen.append(scheme.choose_qparams(group.to(weight.dtype)))
            own = chosen[place[column] // size]
            value = span[:, i : i + 1]
            kept = value if zeros is None else value.masked_fill(zeros[:, column : column + 1], 0)
            code = scheme.encode(kept, own)
            codes[place[column]] = code
            errors[:, i : i + 1] = (value - scheme.decode(code, own)) / u[i, i]
            span[:, i + 1 :].addr_(errors[:, i], u[i, i + 1 :], alpha=-1)
        w[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    qparams = {name: torch.cat([each[name] for each in chosen], -1) for name in chosen[0]}
    return Rounded(torch.cat(codes, -1), qparams, percdamp)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """``‖X W - X Ŵ‖² / ‖X W‖²`` over the inputs of ``hessian`` ``[K, K]``, for weights ``[N, K]``."""
    w, h = weight.to(torch.float32), hessian.to(torch.float32)
    difference = w - rounded.to(torch.float32)
    wrong, whole = ((part @ h).mul_(part).sum() for part in (difference, w))
    return float(wrong.clamp_min(0) / whole.clamp_min(1e-30))


def _spans(columns: int, size: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Blocks of columns that hold whole groups, or lie inside one and begin with it."""
    outer = max(block_size // size, 1) * size
    for start in range(0, columns, outer):
        end = min(start + outer, columns)
        step = outer if size <= block_size else block_size
        for first in range(start, end, step):
            yield first, min(first + step, end)


def _group(w: torch.Tensor, span: torch.Tensor, start: int, column: int, size: int) -> torch.Tensor:
    """The columns of the group that begins at ``column``, with all errors so far handed on."""
    if column == start and size > span.shape[1]:
        return w[:, column : column + size]
    return span[:, column - start : column - start + size]


def _split(qparams: QParams, groups: int) -> list[QParams]:
    """Parameters ``[N, G]`` as G times ``[N, 1]``."""
    return [{name: value[:, g : g + 1] for name, value in qparams.items()} for g in range(groups)]
