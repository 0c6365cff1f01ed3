"""``nf4_linear``: float activations times NF4 weights, double quantization undone on the way."""

from __future__ import annotations

import torch

from ao_core import Key
from ao_kernels.support import group_misfit


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    offset: torch.Tensor | None,
    step: torch.Tensor | None,
    bias: torch.Tensor | None,
    block_size: int,
    scaler_block_size: int,
) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32; the levels are rounded to the dtype of ``x``.

    Args:
        x: bfloat16 or float16 ``[..., K]``.
        packed: uint8 ``[N, ceil(K / 2)]``, the even column in the low four bits.
        absmax: float32 ``[N, G]``, or uint8 that stands for ``(offset + code * step) ** 4``.
        offset: float32 ``[N, S]`` with uint8 absmax, else None.
        step: as ``offset``.
        bias: float ``[N]`` or None.
        block_size: columns to an absmax.
        scaler_block_size: blocks to an offset and a step.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    from ao_kernels.weight_linear import Codes, weight_linear

    weight = Codes("nf4", packed, absmax, block_size, offset=offset, step=step, scaler_size=scaler_block_size)
    return weight_linear(x, weight, bias)


def misfit(key: Key) -> str | None:
    """Why the weights of a call can't be read, or None."""
    _, absmax, *_ = key.weights
    return group_misfit(key.options[0], absmax, 32)
