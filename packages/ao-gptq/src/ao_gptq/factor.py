"""The Hessian, ready for the column loop: damped, in the order of the columns, its inverse factorized."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ao_core.numerics.hessian import damped_factor


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
            percdamp: see :func:`ao_core.numerics.hessian.inverse_factor`.
            act_order: columns with the largest inputs first; else in the weight's order.

        Raises:
            ModelError: see :func:`ao_core.numerics.hessian.inverse_factor`.
        """
        diagonal = hessian.diagonal().to(torch.float32)
        dead = diagonal == 0
        mean = 1.0 if bool(dead.all()) else diagonal[~dead].mean()
        importance = torch.where(dead, mean, diagonal)
        order = torch.arange(len(importance), device=hessian.device)
        if act_order:
            order = importance.argsort(descending=True, stable=True)

        last_first = order.flip(0)

        def reverse() -> torch.Tensor:
            # Some rows at a time: one gather of both would hold an index of eight bytes for each element.
            h = torch.empty_like(hessian, dtype=torch.float32)
            step = -(-len(order) // 16)
            for start in range(0, len(order), step):
                rows = hessian[last_first[start : start + step]]
                h[start : start + step] = rows.index_select(1, last_first)
            h.diagonal().copy_(importance[last_first])
            return h

        upper, percdamp = damped_factor(reverse, float(importance.mean()), percdamp)
        return Factor(upper, order, importance, percdamp, int(dead.sum()), not act_order)

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows H⁻¹`` for ``[N, K]``, H damped; columns in the weight's order before and after."""
        solved = (rows[:, self.order] @ self.upper.t()) @ self.upper
        return torch.empty_like(solved).index_copy_(1, self.order, solved)
