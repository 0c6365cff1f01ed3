"""Scores of weights: what magnitude pruning and Wanda rank by. Free functions on one matrix."""

from __future__ import annotations

import torch


def magnitude_scores(weight: torch.Tensor) -> torch.Tensor:
    """``|W|``, float32 ``[N, K]``."""
    return weight.abs().float()


def wanda_scores(weight: torch.Tensor, squared_norm: torch.Tensor, *, squared: bool = False) -> torch.Tensor:
    """``|W_ij| · ‖X_j‖₂`` (arXiv 2306.11695, equation 1), float32 ``[N, K]``.

    Args:
        weight: float ``[N, K]``.
        squared_norm: ``‖X_j‖₂²``, the sum of squares of each input column: float32 ``[K]``.
        squared: multiply by ``‖X_j‖₂²`` instead, as torchao did in April 2024.
    """
    return weight.abs().float() * (squared_norm if squared else squared_norm.sqrt())
