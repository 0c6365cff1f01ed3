"""``float8_weight_linear``: float activations times float8 weights."""

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


def misfit(key: Key) -> str | None:
    """Why the weights of a call can't be read, or None."""
    codes, *_ = key.weights
    if codes is not None and codes[1] != torch.float8_e4m3fn:
        return f"it takes float8_e4m3fn weights, not {codes[1]}"
    return None
