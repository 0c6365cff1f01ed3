"""Products and linears of int8 codes, as torchao names them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ao_quant.int_mm import int_mm
from ao_quant.primitives_affine import (
    dynamically_quantize_per_tensor,
    quantize_activation_per_token_absmax,
)


def quant_int8_matmul(
    x_vals_int8: Tensor,
    x_scale: Tensor,
    x_zp: Tensor | int | None,
    w_vals_int8_t: Tensor,
    w_vals_int8_t_sums_int64: Tensor | None,
    w_scales: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(x_vals - x_zp) @ w_vals_t * x_scale * w_scales``: exact integers, then float32, one cast.

    Args:
        x_vals_int8: int8 or uint8, ``[..., K]``.
        x_scale: float, ``[1]``, or ``[..., 1]`` with one a token.
        x_zp: zero point of ``x``, an int or shaped as ``x_scale``; None if symmetric.
        w_vals_int8_t: int8, ``[K, N]``, symmetric.
        w_vals_int8_t_sums_int64: ``w_vals_int8_t.sum(0)``, ``[N]``; None has it computed if needed.
        w_scales: ``[N]``, or one for all, in ``out_dtype``.
        out_dtype: of the result.

    Returns:
        ``[..., N]``.

    Raises:
        TypeError: codes or scales of another dtype.
        ValueError: sizes that do not match.
    """
    _check_dtype(w_scales, out_dtype)
    dot = _dot(x_vals_int8, x_zp, w_vals_int8_t, w_vals_int8_t_sums_int64)
    return _scaled(dot, x_scale, w_scales, None, out_dtype)


def quant_int8_dynamic_linear(
    x: Tensor,
    x_quant_min: int,
    x_quant_max: int,
    x_q_dtype: torch.dtype,
    w_vals_int8_t: Tensor,
    w_scales: Tensor,
    w_vals_int8_t_sums_int64: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``F.linear`` with one affine int8 scale for all of ``x`` and one a weight row.

    Args:
        x: float, ``[..., K]``.
        x_quant_min: lowest activation code.
        x_quant_max: highest activation code.
        x_q_dtype: ``torch.int8`` or ``torch.uint8``.
        w_vals_int8_t: int8, ``[K, N]``, symmetric.
        w_scales: ``[N]``, or one for all, in ``out_dtype``.
        w_vals_int8_t_sums_int64: ``w_vals_int8_t.sum(0)``, ``[N]``; None has it computed.
        bias: float ``[N]`` or None; added in float32, before the cast.
        out_dtype: of the result.

    Returns:
        ``[..., N]``.

    Raises:
        TypeError: see ``quant_int8_matmul``.
        ValueError: likewise, and ``dynamically_quantize_per_tensor``.
    """
    _check_dtype(w_scales, out_dtype)
    codes, scale, zero = dynamically_quantize_per_tensor(x, x_quant_min, x_quant_max, x_q_dtype)
    dot = _dot(codes, zero, w_vals_int8_t, w_vals_int8_t_sums_int64)
    return _scaled(dot, scale, w_scales, bias, out_dtype)


def quant_int8_per_token_matmul(
    x_vals_int8: Tensor,
    x_scales: Tensor,
    w_vals_int8_t: Tensor,
    w_scales: Tensor,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``x_vals @ w_vals_t * x_scales * w_scales``: exact int32, then float32, one cast.

    Args:
        x_vals_int8: int8, ``[..., K]``, symmetric.
        x_scales: float, ``[..., 1]`` or any shape with one a token.
        w_vals_int8_t: int8, ``[K, N]``, symmetric.
        w_scales: float, ``[N]``, or one for all.
        output_dtype: of the result.

    Returns:
        ``[..., N]``.

    Raises:
        TypeError: codes that are not int8.
        ValueError: sizes that do not match.
    """
    if x_vals_int8.dtype != torch.int8:
        raise TypeError(f"symmetric activation codes are int8; got {x_vals_int8.dtype}")
    rows = x_vals_int8.shape[:-1]
    if x_scales.numel() != math.prod(rows):
        raise ValueError(
            f"one scale a token of {tuple(x_vals_int8.shape)}; got shape {tuple(x_scales.shape)}"
        )
    dot = _dot(x_vals_int8, None, w_vals_int8_t, None)
    return _scaled(dot, x_scales.reshape(*rows, 1), w_scales, None, output_dtype)


def quant_int8_dynamic_per_token_linear(
    x: Tensor,
    w_vals_int8_t: Tensor,
    w_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``F.linear`` with symmetric int8, one scale a token and one a weight row.

    Args:
        x: float, ``[..., K]``.
        w_vals_int8_t: int8, ``[K, N]``.
        w_scales: float, ``[N]``, or one for all.
        bias: float ``[N]`` or None; added in float32, before the cast.
        out_dtype: of the result.

    Returns:
        ``[..., N]``.

    Raises:
        TypeError: ``x`` is not float, or the weight not int8.
        ValueError: sizes that do not match.
    """
    codes, scales = quantize_activation_per_token_absmax(x)
    return _scaled(_dot(codes, None, w_vals_int8_t, None), scales, w_scales, bias, out_dtype)


def _check_dtype(w_scales: Tensor, out_dtype: torch.dtype) -> None:
    if w_scales.dtype != out_dtype:
        raise TypeError(f"w_scales are {w_scales.dtype}; convert them to the result's {out_dtype}")


def _dot(x: Tensor, zero: Tensor | int | None, w: Tensor, sums: Tensor | None) -> Tensor:
    """``(x - zero) @ w`` in exact integers, ``[..., N]``: int32, or int64 with a zero point."""
    if x.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"activation codes are int8 or uint8; got {x.dtype}")
    if x.dtype == torch.uint8:
        # The same numbers less 128, by their bits: the product takes int8 only.
        x, zero = (x ^ 128).view(torch.int8), (0 if zero is None else zero) - 128
    rows = x.shape[:-1]
    dot = int_mm(x.reshape(math.prod(rows), x.shape[-1]), w).reshape(*rows, w.shape[-1])
    if zero is None:
        return dot
    return dot - zero * (w.sum(0) if sums is None else sums)


def _scaled(
    dot: Tensor, x_scale: Tensor, w_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if w_scales.dim() > 1 or w_scales.numel() not in (1, dot.shape[-1]):
        raise ValueError(f"one weight scale for each of {dot.shape[-1]} outputs; got {tuple(w_scales.shape)}")
    out = dot.to(torch.float32) * x_scale.to(torch.float32) * w_scales.to(torch.float32)
    if bias is not None:
        out = out + bias
    return out.to(dtype)
