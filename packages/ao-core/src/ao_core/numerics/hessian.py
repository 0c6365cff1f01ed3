"""Hessians of a layer's squared output error, ``2/n Σ x xᵀ``: what GPTQ and SparseGPT make of them."""

from __future__ import annotations

from collections.abc import Callable

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


def output_error(weight: torch.Tensor, changed: torch.Tensor, hessian: torch.Tensor) -> float:
    """``‖X W - X Ŵ‖² / ‖X W‖²`` over the inputs of ``hessian`` ``[K, K]``, for weights ``[N, K]``."""
    w, h = weight.to(torch.float32), hessian.to(torch.float32)
    difference = w - changed.to(torch.float32)
    wrong, whole = ((part @ h).mul_(part).sum() for part in (difference, w))
    return float(wrong.clamp_min(0) / whole.clamp_min(1e-30))
