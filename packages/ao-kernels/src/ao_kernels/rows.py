"""Activations as the kernels of weights in codes read them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton

from ao_kernels.device.activations import order_columns, round_tokens

_EPS = torch.finfo(torch.float32).eps


def plain_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[M, K]``, or a copy where neighbouring columns are not beside each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def rounded_tokens(x: torch.Tensor) -> torch.Tensor:
    """Rows of ``x`` ``[M, K]``, each rounded to 256 values: those of int8 codes with a zero point.

    Returns:
        As ``x``, its rows a multiple of 16 bytes apart. A row with infinity or NaN is not finite.
    """
    (m, k), x = x.shape, plain_rows(x)
    out = x.new_empty(m, -(-k // 8) * 8)
    block = min(triton.next_power_of_2(k), 8192)
    if out.numel():
        round_tokens[(m,)](
            x, out, k, x.stride(0), out.stride(0), EPS=_EPS, BLOCK=block,
            num_warps=max(min(block // 512, 16), 1), enable_fp_fusion=True,
        )  # fmt: skip
    return out[:, :k]


def columns_in_order(x: torch.Tensor, width: int, size: int, dtype: Any) -> torch.Tensor:
    """Columns as :func:`ao_kernels.device.activations.order_columns` says, for tiles of ``size`` bytes."""
    x = plain_rows(x)
    out = x.new_empty(x.shape[0], triton.cdiv(width, size) * 2 * size)
    block = 1024
    order_columns[(x.shape[0], triton.cdiv(out.shape[1], 2 * block))](
        x, out, x.shape[1], x.stride(0), out.stride(0), BYTES=size, DTYPE=dtype, BLOCK=block,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def pairs_of_columns(x: torch.Tensor) -> torch.Tensor:
    """Rows of words of two activations; a copy where rows do not start at a whole word."""
    if x.shape[1] % 2:
        x = F.pad(x, (0, 1))
    if x.stride(1) != 1 or x.stride(0) % 2 or x.storage_offset() % 2:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int32)
