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


_GROUPS = (32, 64, 128, 256)
_COLUMNS = 1 << 20


def dynamic_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """Activations rounded to int8, a scale and a zero point a token; sums of a group are exact.

    Args:
        x: bfloat16 or float16 ``[..., K]``.
        packed: uint8 ``[N, ceil(K / 2)]``, the even column in the low four bits.
        scale: float ``[N, G]``.
        bias: float ``[N]`` or None.
        group_size: columns to a scale: 32, 64, 128 or 256; any if there is one group.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    from ao_kernels.int4_mm import dynamic_linear as run

    return run(x, packed, scale, bias, group_size)


def dynamic_misfit(key: Key) -> str | None:
    """Why the weights of a call of ``int8_dynamic_int4_linear`` can't be read, or None."""
    packed, scale, *_ = key.weights
    (group_size,) = key.options
    if scale is not None and scale[0][-1] > 1 and group_size not in _GROUPS:
        return f"it takes groups of {', '.join(map(str, _GROUPS))} columns or whole rows, not of {group_size}"
    if packed is not None and 2 * packed[0][-1] > _COLUMNS:
        return f"it sums up to {_COLUMNS} columns in int32, and there are {2 * packed[0][-1]}"
    return None


def misfit(key: Key) -> str | None:
    """Why the weights of a call can't be read, or None."""
    _, scale, *_ = key.weights
    return group_misfit(key.options[0], scale, 32)
