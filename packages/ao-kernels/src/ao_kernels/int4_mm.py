"""8-bit activations times 4-bit weights in groups: launching."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from ao_kernels.device.activations import quantize_tokens as quantize_tokens_kernel
from ao_kernels.device.int4_gemm import int4_gemm
from ao_kernels.rows import plain_rows
from ao_kernels.weight_linear import check_columns, on_device

_EPS = torch.finfo(torch.float32).eps
_WHOLE_ROW = 64  # bytes of a row at a time, where it has one scale


class Tile(NamedTuple):
    """Rows and columns of the output to a program, its warps, and tiles of operands under way."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Up to so many rows. Not measured: what the products of int8 weights take, with less under way for groups.
_TILES = ((16, Tile(16, 32, 4, 4)), (32, Tile(32, 32, 4, 4)), (64, Tile(64, 64, 4, 4)))
_MANY = Tile(128, 128, 8, 3)


def tile_for(m: int) -> Tile:
    """For ``m`` rows."""
    return next((tile for most, tile in _TILES if m <= most), _MANY)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric int8 codes of each row of ``x`` ``[M, K]``: ``x ≈ (codes - zero) * scale``.

    Returns:
        int8 ``[M, K]``, its rows a multiple of 16 bytes apart, float32 and int32 ``[M]``. A row with infinity
        or NaN has that as its scale.
    """
    (m, k), x = x.shape, plain_rows(x)
    codes = x.new_empty(m, -(-k // 16) * 16, dtype=torch.int8)
    scale, zero = x.new_empty(m, dtype=torch.float32), x.new_empty(m, dtype=torch.int32)
    block = min(triton.next_power_of_2(k), 8192)
    with on_device(x.device):
        quantize_tokens_kernel[(m,)](
            x, codes, scale, zero, k, x.stride(0), codes.stride(0), EPS=_EPS, BLOCK=block,
            num_warps=max(min(block // 512, 16), 1),
        )  # fmt: skip
    return codes[:, :k], scale, zero


def dynamic_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``x`` ``[..., K]`` quantized row by row, times ``packed`` ``[N, ceil(K / 2)]``; in the dtype of ``x``.

    Args:
        x: bfloat16 or float16.
        packed: uint8, the even column in the low four bits; a code stands for itself less 8.
        scale: float ``[N, G]``.
        bias: float ``[N]`` or None.
        group_size: columns to a scale; -1 for all.
        tile: by default that of :func:`tile_for`.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    (n, width), k = packed.shape, x.shape[-1]
    check_columns(x, 2 * width - 1, 2 * width)
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    out = x.new_empty(m, n)
    if out.numel():
        x_codes, x_scale, x_zero = quantize_tokens(rows)
        codes, scale = plain_rows(packed), scale.contiguous()
        group = 0 if scale.shape[1] == 1 else group_size // 2
        size, tile = group or _WHOLE_ROW, tile or tile_for(m)
        with on_device(x.device):
            int4_gemm[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
                x_codes, codes, x_scale, x_zero, scale, scale if bias is None else bias.contiguous(), out,
                m, n, k, width, x_codes.stride(0), codes.stride(0), scale.shape[1],
                GROUP=group, BIAS=bias is not None, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                BYTES=size, STAGES=tile.stages, WHOLE=k % (2 * size) == 0, num_warps=tile.warps,
            )  # fmt: skip
    return out.view(*x.shape[:-1], n)
