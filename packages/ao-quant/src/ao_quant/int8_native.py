"""The native kernels of the int8 linears.

torch's own lose to the float linear in places: its int8 kernel from about 8 rows on, and dequantizing by
torch ops costs more than the multiplication.
"""

from __future__ import annotations

import torch

from ao_core import Kernel, Key
from ao_quant.int8_ops import check_input, dynamic_linear_torch
from ao_quant.native_linear import INT8, SYMMETRIC, bias_misfit, linear, misfit, rejects


def weight_linear_native(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``int8_weight_linear``; arguments are those of :func:`ao_quant.int8_ops.weight_linear_reference`."""
    check_input(x, codes)
    return linear(INT8, x, codes, scale, bias, group_size=group_size)


def dynamic_linear_native(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``int8_dynamic_linear``: activations quantized in one pass, then exact products.

    Few rows are summed in float32, whose partial sums are exact up to 2**24; many in int32.
    """
    check_input(x, codes)
    return linear(
        INT8,
        x,
        codes,
        scale,
        bias,
        rounding=SYMMETRIC,
        otherwise=lambda: dynamic_linear_torch(x, codes, scale, bias),
    )


def _rejects(key: Key) -> str | None:
    return rejects(key, _misfit)


def _misfit(key: Key) -> str:
    codes, scale, bias = key.weights
    reason = misfit("int8 codes", codes, (torch.int8,), None, None)
    if reason or codes is None:
        return reason
    (n, k), size = codes[0], key.options[0] if key.options else -1
    if size == 0:
        return "groups of 0 columns hold no weight"
    groups = 1 if size < 0 else -(-k // size)
    return misfit("scales", scale, (torch.float32,), n, groups) or bias_misfit(bias, n)


KERNELS = [
    Kernel("int8_weight_linear", "native", weight_linear_native, priority=10, rejects=_rejects),
    Kernel("int8_dynamic_linear", "native", dynamic_linear_native, priority=10, rejects=_rejects),
]
