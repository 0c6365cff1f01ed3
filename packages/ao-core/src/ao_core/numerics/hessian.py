"""Hessians of a layer's squared output error, ``2/n Σ x xᵀ``: what GPTQ and SparseGPT make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ao_core.errors import ModelError

_LARGEST_DAMP = 10.0
_ELEMENTS = 1 << 24  # whose errors are multiplied at a time: enough to fill a GPU


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
    return damped_factor(lambda: hessian.flip(0, 1), float(hessian.diagonal().mean()), percdamp)


def damped_factor(
    reverse: Callable[[], torch.Tensor], mean: float, percdamp: float
) -> tuple[torch.Tensor, float]:
    """:func:`inverse_factor` of a Hessian that is made anew for each try, and then overwritten.

    Args:
        reverse: makes the float32 ``[K, K]``, rows and columns in reverse order.
        mean: of its diagonal.
        percdamp: see there.

    Raises:
        ModelError: see there.
    """
    while percdamp <= _LARGEST_DAMP:
        upper = _factorized([reverse()], percdamp * mean)
        if upper is not None:
            return upper, percdamp
        percdamp = max(10 * percdamp, 1e-4)
    shape = tuple(reverse().shape)
    raise ModelError(
        f"the Hessian {shape} has no Cholesky factor, even with {_LARGEST_DAMP:g} times its mean diagonal "
        "added. Look for NaN or infinity in the calibration inputs."
    )


def _factorized(own: list[torch.Tensor], added: float) -> torch.Tensor | None:
    """The factor of the one matrix in ``own``, which is emptied, or None; holds two matrices at most.

    The matrix has its columns and rows in reverse order and is ``L Lᵀ``; so ``H = R Rᵀ`` with the upper
    ``R``, ``L`` in reverse, and the inverse is ``Uᵀ U`` with ``U = R⁻¹``: one factorization, and no inverse
    of H is formed.
    """
    lower = own.pop().mT  # column by column, as LAPACK and cuSOLVER write it: the factor takes its place
    lower.diagonal().add_(added)
    failed = torch.empty((), dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if failed:
        return None
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    _reverse(inverse.view(-1))  # both orders at once: U
    return inverse if finite(inverse) else None


def _reverse(values: torch.Tensor) -> None:
    """Reverse the order of ``[n]`` in place, a part of it at a time."""
    half = len(values) // 2
    step = max(half // 16, 1 << 16)
    for start in range(0, half, step):
        end = min(start + step, half)
        front, back = values[start:end], values[len(values) - end : len(values) - start]
        held = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(held)


def finite(values: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity; needs no memory of its own."""
    return not values.numel() or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def output_error(weight: torch.Tensor, changed: torch.Tensor, hessian: torch.Tensor) -> float:
    """``‖X W - X Ŵ‖² / ‖X W‖²`` over the inputs of ``hessian`` ``[K, K]``, for weights ``[N, K]``."""
    return output_errors(weight, (changed,), hessian)[0]


def output_errors(
    weight: torch.Tensor, changed: Iterable[torch.Tensor], hessian: torch.Tensor
) -> list[float]:
    """:func:`output_error` of each of ``changed``; some rows of ``[N, K]`` at a time."""
    h = hessian.to(torch.float32)
    step = max(_ELEMENTS // h.shape[1], 1)

    def total(first: torch.Tensor, second: torch.Tensor | None = None) -> torch.Tensor:
        found = torch.zeros((), device=h.device)
        for start in range(0, len(first), step):
            rows = first[start : start + step].to(torch.float32)
            if second is not None:
                rows = rows - second[start : start + step].to(torch.float32)
            found += (rows @ h).mul_(rows).sum()
        return found

    whole = total(weight).clamp_min(1e-30)
    return [float(total(weight, each).clamp_min(0) / whole) for each in changed]
