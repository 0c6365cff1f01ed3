"""Quantization to a small sorted table of levels: each code is the index of the nearest level."""

from __future__ import annotations

import torch
from torch import Tensor


def encode(values: Tensor, codebook: Tensor) -> Tensor:
    """Index of the level nearest to each value; a tie takes the lower index.

    Values are compared as float32 and exactly: the answer of a search over all distances, without
    its ``numel x levels`` temporary. Inf takes an end level and NaN the last: refuse it before.

    Args:
        values: float, any shape.
        codebook: float, ``[L]``, strictly ascending, ``1 <= L <= 256``, on the values' device.

    Returns:
        uint8, shaped as ``values``.

    Raises:
        TypeError: ``values`` is not a float tensor.
        ValueError: a codebook of another shape, or not ascending (not looked at when compiling).
    """
    if not values.is_floating_point():
        raise TypeError(f"expected float values to encode; got {values.dtype}")
    _check_codebook(codebook)
    levels = values.detach().to(torch.float32).contiguous()
    return torch.bucketize(levels, _boundaries(codebook), out_int32=True).to(torch.uint8)


def decode(codes: Tensor, codebook: Tensor) -> Tensor:
    """``codebook[codes]``: the level that each code stands for.

    Args:
        codes: integers in ``[0, L)``, any shape.
        codebook: ``[L]``, any dtype.

    Returns:
        Shaped as ``codes``, in the codebook's dtype.

    Raises:
        TypeError: ``codes`` are not integers.
        IndexError: a code beyond the table (on a GPU: a device-side assertion).
    """
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise TypeError(f"expected integer codes to decode; got {codes.dtype}")
    return codebook.index_select(0, codes.flatten().to(torch.int32)).reshape(codes.shape)


def _check_codebook(codebook: Tensor) -> None:
    if codebook.dim() != 1 or not 1 <= codebook.shape[0] <= 256:
        raise ValueError(f"a codebook is one row of 1 to 256 levels; got shape {tuple(codebook.shape)}")
    # Reading the comparison would break a compiled graph.
    if not torch.compiler.is_compiling() and not bool((codebook[1:] > codebook[:-1]).all()):
        raise ValueError("codebook levels must ascend strictly; sort them and drop duplicates")


def _boundaries(codebook: Tensor) -> Tensor:
    """``[L] -> [L - 1]``: the largest float32 that is not beyond each midpoint.

    A float32 value is at most this exactly when it is at most the true midpoint, which float32 may
    not be able to hold.
    """
    exact = codebook.detach().to(torch.float64)
    middle = exact[:-1] + (exact[1:] - exact[:-1]) / 2
    rounded = middle.to(torch.float32)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.to(torch.float64) > middle, below, rounded)
