"""``int8_weight_linear`` and ``int8_dynamic_linear``: float or int8 activations times int8 weights."""

from __future__ import annotations

import torch

from ao_core import Key
from ao_kernels.support import group_misfit


def weight_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """``x @ (codes * scale).T + bias``, summed in float32.

    Args:
        x: bfloat16 or float16 ``[..., K]``.
        codes: int8 ``[N, K]``.
        scale: float ``[N, G]``.
        bias: float ``[N]`` or None.
        group_size: columns to a scale; -1 for all.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    from ao_kernels.weight_linear import Codes
    from ao_kernels.weight_linear import weight_linear as run

    return run(x, Codes("int8", codes, scale, group_size), bias)


def weight_misfit(key: Key) -> str | None:
    """Why the weights of a call of ``int8_weight_linear`` can't be read, or None."""
    _, scale, *_ = key.weights
    return group_misfit(key.options[0], scale, 16)


def dynamic_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Activations rounded to int8, one scale a token, times int8 weights; sums are exact.

    Args:
        x: bfloat16 or float16 ``[..., K]``.
        codes: int8 ``[N, K]``.
        scale: float ``[N, 1]``.
        bias: float ``[N]`` or None.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    from ao_kernels.int8_mm import dynamic_linear as run

    return run(x, codes, scale, bias)


def dynamic_misfit(key: Key) -> str | None:
    """Why the weights of a call of ``int8_dynamic_linear`` can't be read, or None."""
    return None
