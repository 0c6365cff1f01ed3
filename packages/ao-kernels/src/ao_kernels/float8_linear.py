"""``float8_weight_linear`` and ``float8_dynamic_linear``: float and float8 activations, float8 weights."""

from __future__ import annotations

import torch

from ao_core import Key


def linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x @ (codes * scale).T + bias``, summed in float32.

    Args:
        x: bfloat16 or float16 ``[..., K]``.
        codes: float8_e4m3fn ``[N, K]``, finite.
        scale: float32 ``[N, 1]`` or ``[1, 1]``.
        bias: float ``[N]`` or None.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    from ao_kernels.weight_linear import Codes, weight_linear

    return weight_linear(x, Codes("float8", codes, scale), bias)


def dynamic_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, rowwise: bool
) -> torch.Tensor:
    """Activations rounded to float8, one scale a token, times float8 weights, summed in float32.

    Args:
        x: bfloat16 or float16 ``[..., K]``.
        codes: float8_e4m3fn ``[N, K]``.
        scale: float32 ``[N, 1]`` or ``[1, 1]``.
        bias: float ``[N]`` or None.
        rowwise: True.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    from ao_kernels.int8_mm import dynamic_linear as run

    return run(x, codes, scale.expand(codes.shape[0], 1), bias)


def dynamic_misfit(key: Key) -> str | None:
    """Why a call of ``float8_dynamic_linear`` can't be computed, or None."""
    (rowwise,) = key.options
    if not rowwise:
        return "it scales activations row by row, and one scale for all was asked for"
    if key.device.type == "cuda" and key.capability < (8, 9):
        major, minor = key.capability
        return f"tensor cores multiply float8 from compute capability 8.9 on, and this is {major}.{minor}"
    return misfit(key)


def misfit(key: Key) -> str | None:
    """Why the weights of a call can't be read, or None."""
    codes, *_ = key.weights
    if codes is not None and codes[1] != torch.float8_e4m3fn:
        return f"it takes float8_e4m3fn weights, not {codes[1]}"
    return None
