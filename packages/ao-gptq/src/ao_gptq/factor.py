"""The Hessian, ready for the column loop: damped, in the order of the columns, its inverse factorized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ao_core import ModelError

_LARGEST_DAMP = 10.0


@dataclass(frozen=True)
class Factor:
    """What the column loop needs of a Hessian ``[K, K]``.

    Attributes:
        upper: float32 ``[K, K]``, the Cholesky factor of the damped Hessian's inverse, columns in ``order``.
        order: int64 ``[K]``, in which columns are rounded.
        importance: float32 ``[K]``, the Hessian's diagonal in the weight's own order, of dead columns the
            mean of the others.
        percdamp: the damping that the factorization took: more than asked for where that was too little.
        dead: how many columns no input reached.
        plain: whether ``order`` is that of the weight.
    """

    upper: torch.Tensor
    order: torch.Tensor
    importance: torch.Tensor
    percdamp: float
    dead: int
    plain: bool

    @staticmethod
    def of(hessian: torch.Tensor, *, percdamp: float = 0.01, act_order: bool = False) -> Factor:
        """The factor of a Hessian.

        Args:
            hessian: ``2/n Σ x xᵀ``, float32 ``[K, K]``. Columns that no input reached have a zero on the
                diagonal, and get the others' mean.
            percdamp: see :func:`inverse_factor`.
            act_order: columns with the largest inputs first; else in the weight's order.

        Raises:
            ModelError: see :func:`inverse_factor`.
        """
        diagonal = hessian.diagonal().to(torch.float32)
        dead = diagonal == 0
        mean = 1.0 if bool(dead.all()) else diagonal[~dead].mean()
        importance = torch.where(dead, mean, diagonal)
        order = torch.arange(len(importance), device=hessian.device)
        if act_order:
            order = importance.argsort(descending=True, stable=True)

        def ordered() -> torch.Tensor:
            h = hessian.to(torch.float32)
            h = h.index_select(0, order).index_select(1, order) if act_order else h.clone()
            h.diagonal().copy_(importance[order])
            return h

        upper, percdamp = _damped_factor(ordered, float(importance.mean()), percdamp)
        return Factor(upper, order, importance, percdamp, int(dead.sum()), not act_order)

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows H⁻¹`` for ``[N, K]``, H damped; columns in the weight's order before and after."""
        solved = (rows[:, self.order] @ self.upper.t()) @ self.upper
        return torch.empty_like(solved).index_copy_(1, self.order, solved)


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
    return _damped_factor(hessian.clone, float(hessian.diagonal().mean()), percdamp)


def _damped_factor(
    hessian: Callable[[], torch.Tensor], mean: float, percdamp: float
) -> tuple[torch.Tensor, float]:
    """:func:`inverse_factor` of what ``hessian`` makes anew for each try, and which is not kept."""
    while percdamp <= _LARGEST_DAMP:
        upper = _factorized([hessian()], percdamp * mean)
        if upper is not None:
            return upper, percdamp
        percdamp = max(10 * percdamp, 1e-4)
    shape = tuple(hessian().shape)
    raise ModelError(
        f"the Hessian {shape} has no Cholesky factor, even with {_LARGEST_DAMP:g} times its mean diagonal "
        "added. Look for NaN or infinity in the calibration inputs."
    )


def _factorized(own: list[torch.Tensor], added: float) -> torch.Tensor | None:
    """The factor of the one matrix in ``own``, which is emptied, or None; holds two matrices at a time."""
    own[0].diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(own[0])
    own.clear()
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not bool(torch.isfinite(upper).all()) else upper
