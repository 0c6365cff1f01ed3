"""Hessians of a layer's squared output error, ``2/n Σ x xᵀ``: what GPTQ and SparseGPT make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ao_core.errors import ModelError

_LARGEST_DAMP = 10.0


def inverse_factor(hessian: torch.Tensor, percdamp: float) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the damped Hessian's inverse (arXiv 2210.17323, section 3.3).

    Args:
        hessian: float32 ``[K, K]``, symmetric, no zero on its diagonal.
        percdamp: what is added to the diagonal, as a share of its mean. Ten times as much is tried as
            long as the factorization fails.

    Returns:
        The factor ``[K, K]``, and the share that was added.

    Raises:
        ModelError: it fails with ten times the diagonal's mean: the Hessian is no sum of squares.
    """
    return damped_factor(hessian.clone, float(hessian.diagonal().mean()), percdamp)


def damped_factor(
    hessian: Callable[[], torch.Tensor], mean: float, percdamp: float
) -> tuple[torch.Tensor, float]:
    """:func:`inverse_factor` of what ``hessian`` makes anew for each try, and which is not kept.

    Args:
        hessian: makes the float32 ``[K, K]``.
        mean: of its diagonal.
        percdamp: see there.

    Raises:
        ModelError: see there.
    """
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
    """The factor of the one matrix in ``own``, which is emptied, or None; holds two matrices at a time.

    With columns and rows in reverse order, ``H = L Lᵀ``; so ``H = R Rᵀ`` with the upper ``R``, ``L`` in
    reverse, and the inverse is ``Uᵀ U`` with ``U = R⁻¹``: one factorization, and no inverse of H is formed.
    """
    own[0].diagonal().add_(added)
    own.append(own.pop().flip(0, 1))
    lower, failed = torch.linalg.cholesky_ex(own[0])
    own.clear()
    if failed:
        return None
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    upper = inverse.flip(0, 1)
    return upper if bool(torch.isfinite(upper).all()) else None


def output_error(weight: torch.Tensor, changed: torch.Tensor, hessian: torch.Tensor) -> float:
    """``‖X W - X Ŵ‖² / ‖X W‖²`` over the inputs of ``hessian`` ``[K, K]``, for weights ``[N, K]``."""
    return output_errors(weight, (changed,), hessian)[0]


def output_errors(
    weight: torch.Tensor, changed: Iterable[torch.Tensor], hessian: torch.Tensor
) -> list[float]:
    """:func:`output_error` of each of ``changed``."""
    w, h = weight.to(torch.float32), hessian.to(torch.float32)
    whole = (w @ h).mul_(w).sum().clamp_min(1e-30)
    found = []
    for each in changed:
        difference = w - each.to(torch.float32)
        found.append(float((difference @ h).mul_(difference).sum().clamp_min(0) / whole))
    return found
