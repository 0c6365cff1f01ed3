"""Group-wise symmetric codes of 2 to 8 bits, and two of 4 bits in a byte, as torchao names them."""

from __future__ import annotations

import torch
from torch import Tensor

from ao_core.numerics import affine
from ao_quant.primitives_groupwise import group_columns


def get_group_qparams_symmetric(
    w: Tensor, n_bit: int = 4, groupsize: int = 128, precision: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Scales ``absmax / ((2 ** n_bit - 1) / 2)`` a group, at least float32's eps, and zeros of 0.

    Args:
        w: float, ``[N, K]``, no NaN.
        n_bit: 2 to 8.
        groupsize: input columns a group, at least 2, a divisor of K; K itself if larger than K.
        precision: dtype of the results.

    Returns:
        ``(scales, zeros)``, ``[N, K / groupsize]`` in ``precision``.

    Raises:
        TypeError: ``w`` is not a float tensor.
        ValueError: not 2-D, NaN, or a bad ``groupsize`` or ``n_bit``.
    """
    size = group_columns(w.shape, n_bit, groupsize)
    low, high = _code_range(n_bit)
    scales = affine.choose_symmetric(w, qmin=low, qmax=high, group_size=size)
    if bool(scales.isnan().any()):
        raise ValueError("the weight holds NaN; mend it before quantizing")
    scales = scales.to(precision)
    return scales, torch.zeros_like(scales)


def group_quantize_tensor_symmetric(
    w: Tensor, n_bit: int = 4, group_size: int = 128, precision: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric codes in ``[-2 ** (n_bit - 1), 2 ** (n_bit - 1))``, one scale a group.

    Args:
        w: float, ``[N, K]``, no NaN.
        n_bit: 2 to 8.
        group_size: see ``get_group_qparams_symmetric``, its errors too.
        precision: dtype of scales and zeros.

    Returns:
        ``(codes, scales, zeros)``: int8 ``[N, K]``; two of ``[N, K / group_size]``.
    """
    scales, zeros = get_group_qparams_symmetric(w, n_bit, group_size, precision)
    low, high = _code_range(n_bit)
    codes = affine.quantize(w, scales, qmin=low, qmax=high, group_size=group_size)
    return codes, scales, zeros


def pack_int4_from_int8(int8_data: Tensor) -> Tensor:
    """``[..., K]`` to ``[..., K / 2]``: even columns in the high nibble, odd ones in the low.

    Args:
        int8_data: int8 codes in [-8, 7], K even.

    Returns:
        int8.

    Raises:
        TypeError: not int8.
        ValueError: odd K, or a code out of range (not looked at when compiling).
    """
    if int8_data.dtype != torch.int8:
        raise TypeError(f"expected int8 codes; got {int8_data.dtype}")
    if int8_data.shape[-1] % 2:
        raise ValueError(f"two codes fill a byte, but there are {int8_data.shape[-1]}; pad to even")
    if not torch.compiler.is_compiling() and bool(((int8_data < -8) | (int8_data > 7)).any()):
        raise ValueError("codes beyond [-8, 7] do not fit 4 signed bits; shift or clamp them")
    packed: Tensor = (int8_data[..., ::2] << 4) | (int8_data[..., 1::2] & 0xF)
    return packed


def unpack_int4_to_int8(int8_data: Tensor) -> Tensor:
    """``[..., K / 2]`` to int8 ``[..., K]`` in [-8, 7]: the inverse of ``pack_int4_from_int8``.

    Args:
        int8_data: packed bytes, int8 or uint8.

    Raises:
        TypeError: another dtype.
    """
    if int8_data.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"expected packed bytes; got {int8_data.dtype}")
    signed = int8_data.view(torch.int8)
    # Shifting an int8 right copies its sign: that is the extension of the nibble.
    return torch.stack((signed >> 4, (signed << 4) >> 4), -1).flatten(-2)


def _code_range(n_bit: int) -> tuple[int, int]:
    return -(2 ** (n_bit - 1)), 2 ** (n_bit - 1) - 1
