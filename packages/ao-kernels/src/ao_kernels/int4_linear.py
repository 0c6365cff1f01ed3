"""``int4_weight_linear``: float activations times 4-bit weights in groups."""

from __future__ import annotations

import torch

from ao_core import Key
from ao_kernels.support import group_misfit


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32.

    Args:
        x: bfloat16 or float16 ``[..., K]``.
        packed: uint8 ``[N, ceil(K / 2)]``, the even column in the low four bits.
        scale: float ``[N, G]``.
        zero: None, float midpoints, or uint8 zero points ``[N, G]``.
        bias: float ``[N]`` or None.
        group_size: columns to a scale; -1 for all.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    from ao_kernels.weight_linear import Codes, weight_linear

    return weight_linear(x, Codes("int4", packed, scale, group_size, zero), bias)


def misfit(key: Key) -> str | None:
    """Why the weights of a call can't be read, or None."""
    _, scale, *_ = key.weights
    return group_misfit(key.options[0], scale, 32)
