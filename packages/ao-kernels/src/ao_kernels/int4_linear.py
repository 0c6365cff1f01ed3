"""``int4_weight_linear`` and ``int8_dynamic_int4_linear``: float and int8 activations times 4-bit weights."""

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


def dynamic_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """Activations rounded to int8, a scale and a zero point a token, times 4-bit weights.

    No tensor core multiplies int8 by 4 bits: products are those of :func:`linear`, with the floats that the
    activations' codes stand for. Rounding these to bfloat16 makes a quarter of the error that quantizing
    makes, so together 3% more.

    Args:
        x: bfloat16 or float16 ``[..., K]``.
        packed: uint8 ``[N, ceil(K / 2)]``.
        scale: float ``[N, G]``.
        bias: float ``[N]`` or None.
        group_size: columns to a scale; -1 for all.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    from ao_kernels.rows import rounded_tokens
    from ao_kernels.weight_linear import on_device

    with on_device(x.device):
        rounded = rounded_tokens(x.reshape(-1, x.shape[-1]))
    out = linear(rounded, packed, scale, None, bias, group_size)
    return out.view(*x.shape[:-1], out.shape[-1])


def misfit(key: Key) -> str | None:
    """Why the weights of a call can't be read, or None."""
    _, scale, *_ = key.weights
    return group_misfit(key.options[0], scale, 32)
