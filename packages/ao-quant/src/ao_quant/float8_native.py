"""The native kernels of the float8 linears."""

from __future__ import annotations

import torch

from ao_core import Kernel, Key
from ao_quant import float8_ops
from ao_quant.int8_ops import check_input
from ao_quant.native_linear import FLOAT8, FLOAT8_ONE, FLOAT8_ROWS, bias_misfit, linear, misfit, rejects


def weight_linear_native(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``float8_weight_linear``; arguments: :func:`ao_quant.float8_ops.weight_linear_reference`."""
    check_input(x, codes)
    return linear(FLOAT8, x, codes, scale, bias)


def dynamic_linear_native(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, rowwise: bool
) -> torch.Tensor:
    """``float8_dynamic_linear``: activations rounded in one pass; both sides are exact in bfloat16."""
    check_input(x, codes)
    return linear(
        FLOAT8,
        x,
        codes,
        scale,
        bias,
        rounding=FLOAT8_ROWS if rowwise else FLOAT8_ONE,
        otherwise=lambda: float8_ops.dynamic_linear_torch(x, codes, scale, bias, rowwise),
    )


def _rejects(key: Key) -> str | None:
    return rejects(key, _misfit)


def _misfit(key: Key) -> str:
    codes, scale, bias = key.weights
    reason = misfit("float8 codes", codes, (float8_ops.FLOAT8,), None, None)
    if reason or codes is None:
        return reason
    n = codes[0][0]
    if misfit("scales", scale, (torch.float32,), 1, 1):
        reason = misfit("scales", scale, (torch.float32,), n, 1)
    return reason or bias_misfit(bias, n)


KERNELS = [
    Kernel("float8_weight_linear", "native", weight_linear_native, priority=10, rejects=_rejects),
    Kernel("float8_dynamic_linear", "native", dynamic_linear_native, priority=10, rejects=_rejects),
]
