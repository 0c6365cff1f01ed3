"""The native kernels of the linears whose weights are two codes a byte: int4 and NF4."""

from __future__ import annotations

import torch

from ao_core import Kernel, Key
from ao_quant.decoded import check_packed_input
from ao_quant.int4_ops import dynamic_linear_torch
from ao_quant.native_linear import AFFINE, INT4, NF4, Outline, bias_misfit, linear, misfit, rejects

_FLOATS = (torch.float32, torch.bfloat16)


def int4_linear_native(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``int4_weight_linear``; arguments are those of :func:`ao_quant.int4_ops.weight_linear_reference`."""
    check_packed_input(x, packed)
    return linear(INT4, x, packed, scale, bias, zero=zero, group_size=group_size)


def dynamic_linear_native(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``int8_dynamic_int4_linear``: activations quantized in one pass, then exact sums of each group."""
    check_packed_input(x, packed)
    return linear(
        INT4,
        x,
        packed,
        scale,
        bias,
        group_size=group_size,
        rounding=AFFINE,
        otherwise=lambda: dynamic_linear_torch(x, packed, scale, bias, group_size),
    )


def nf4_linear_native(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    offset: torch.Tensor | None,
    step: torch.Tensor | None,
    bias: torch.Tensor | None,
    block_size: int,
    scaler_block_size: int,
) -> torch.Tensor:
    """``nf4_linear``; arguments are those of :func:`ao_quant.nf4_ops.linear_reference`.

    With bfloat16 activations the levels are rounded to bfloat16.
    """
    check_packed_input(x, packed)
    return linear(
        NF4,
        x,
        packed,
        absmax,
        bias,
        offset=offset,
        step=step,
        group_size=block_size,
        scaler_size=scaler_block_size,
    )


def _int4_rejects(key: Key) -> str | None:
    return rejects(key, _int4_misfit)


def _int4_misfit(key: Key) -> str:
    packed, scale, *zeros, bias = key.weights  # with 8-bit activations there are no zero points
    reason = _grouped_misfit(packed, scale, _FLOATS, key.options[0])
    if reason or scale is None:
        return reason
    if zeros and zeros[0] is not None:
        reason = misfit("zero points", zeros[0], (*_FLOATS, torch.uint8), *scale[0])
    return reason or bias_misfit(bias, scale[0][0])


def _nf4_rejects(key: Key) -> str | None:
    return rejects(key, _nf4_misfit)


def _nf4_misfit(key: Key) -> str:
    packed, absmax, offset, step, bias = key.weights
    block_size, scaler_block_size = key.options
    coded = offset is not None or step is not None
    reason = _grouped_misfit(packed, absmax, (torch.uint8 if coded else torch.float32,), block_size)
    if reason or absmax is None:
        return reason
    n, blocks = absmax[0]
    if coded and scaler_block_size < 1:
        reason = f"scaler_block_size is 1 or more, not {scaler_block_size}"
    elif coded:
        scalers = -(-blocks // scaler_block_size)
        reason = misfit("offsets", offset, (torch.float32,), n, scalers)
        reason = reason or misfit("steps", step, (torch.float32,), n, scalers)
    return reason or bias_misfit(bias, n)


def _grouped_misfit(
    packed: Outline | None, scale: Outline | None, dtypes: tuple[torch.dtype, ...], size: int
) -> str:
    """The last byte of a row may hold one code or two: either number of columns may be the right one."""
    reason = misfit("packed codes", packed, (torch.uint8,), None, None)
    if size == 0:
        reason = "groups of 0 columns hold no weight"
    if reason or packed is None:
        return reason
    n, width = packed[0]
    fewest, most = (1 if size < 0 else -(-columns // size) for columns in (2 * width - 1, 2 * width))
    if misfit("scales", scale, dtypes, n, fewest):
        reason = misfit("scales", scale, dtypes, n, most)
    return reason


KERNELS = [
    Kernel("int4_weight_linear", "native", int4_linear_native, priority=10, rejects=_int4_rejects),
    Kernel("int8_dynamic_int4_linear", "native", dynamic_linear_native, priority=10, rejects=_int4_rejects),
    Kernel("nf4_linear", "native", nf4_linear_native, priority=10, rejects=_nf4_rejects),
]
