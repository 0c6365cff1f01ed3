"""``nf4_linear`` and ``nf4_dequantize``: NF4 weights, double quantization undone on the way."""

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


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    offset: torch.Tensor | None,
    step: torch.Tensor | None,
    columns: int,
    block_size: int,
    scaler_block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``level * absmax`` ``[..., N, columns]``, to the bit what the reference gives.

    Args:
        packed: uint8 ``[..., N, ceil(columns / 2)]``.
        absmax: as :func:`linear`, with the leading dimensions of ``packed``; so are the others.
        offset: see there.
        step: see there.
        columns: K.
        block_size: columns to an absmax.
        scaler_block_size: blocks to an offset and a step.
        dtype: of the result: bfloat16, float16 or float32.

    Raises:
        ValueError: packed codes that are not of ``columns``.
    """
    from ao_kernels.weight_linear import Codes, dequantized, on_device

    if packed.shape[-1] != -(-columns // 2):
        raise ValueError(f"{columns} columns take {-(-columns // 2)} bytes a row, not {packed.shape[-1]}")
    leading = packed.shape[:-1]
    if 0 in (*leading, columns):
        return packed.new_empty(*leading, columns, dtype=dtype)

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1, tensor.shape[-1])

    coded = {name: flat(each) for name, each in (("offset", offset), ("step", step)) if each is not None}
    weight = Codes("nf4", flat(packed), flat(absmax), block_size, scaler_size=scaler_block_size, **coded)
    with on_device(packed.device):
        rows = slice(0, leading.numel())
        return dequantized(weight, columns, dtype, rows, exact=True).view(*leading, columns)


def dequantize_misfit(key: Key) -> str | None:
    """Why the weights of a call of ``nf4_dequantize`` can't be read, or None."""
    absmax, *_ = key.weights
    _, block_size, _, dtype = key.options
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it makes bfloat16, float16 and float32, not {dtype}"
    return group_misfit(block_size, absmax, 32)


def misfit(key: Key) -> str | None:
    """Why the weights of a call can't be read, or None."""
    _, absmax, *_ = key.weights
    return group_misfit(key.options[0], absmax, 32)
