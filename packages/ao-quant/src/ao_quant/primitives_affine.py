"""Scales and codes for a whole tensor, a channel or a token, as torchao names them."""

from __future__ import annotations

import torch
from torch import Tensor

from ao_core.numerics import affine


def dynamically_quantize_per_tensor(
    x: Tensor,
    quant_min: int,
    quant_max: int,
    target_dtype: torch.dtype,
    qscheme: torch.qscheme = torch.per_tensor_affine,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize with one scale for the whole tensor, taken from its own range.

    Args:
        x: float, any shape.
        quant_min: lowest code.
        quant_max: highest code.
        target_dtype: integer dtype of the codes.
        qscheme: ``torch.per_tensor_affine``, the range widened to hold 0, or
            ``torch.per_tensor_symmetric``: ``absmax / ((quant_max - quant_min) / 2)``.

    Returns:
        ``(codes, scale, zero_point)``: codes shaped as ``x``; scale ``[1]`` in ``x.dtype``; zero
        point int32 ``[1]``, None if symmetric.

    Raises:
        TypeError: ``x`` is not a float tensor.
        ValueError: another qscheme, a range the dtype cannot hold, or a symmetric one without both
            signs.
    """
    if qscheme not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        raise ValueError(f"qscheme {qscheme} is not per_tensor_affine or per_tensor_symmetric")
    flat = x.reshape(-1)
    zero_point = None
    if qscheme == torch.per_tensor_affine:
        scale, zero_point = affine.choose_affine(flat, qmin=quant_min, qmax=quant_max)
    else:
        _check_signed(quant_min, quant_max)
        scale = affine.choose_symmetric(flat, qmin=quant_min, qmax=quant_max)
    scale = scale.to(x.dtype)
    codes = affine.quantize(
        flat, scale, qmin=quant_min, qmax=quant_max, zero_point=zero_point, dtype=target_dtype
    )
    return codes.reshape(x.shape), scale, zero_point


def quantize_activation_per_token_absmax(t: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale a token: ``max(absmax, 1e-5) / 127``.

    Args:
        t: float, ``[..., K]``.

    Returns:
        ``(codes, scales)``: int8 ``[..., K]`` within [-127, 127]; ``[..., 1]`` in ``t.dtype``, but
        float32 for float16, whose range is too small.

    Raises:
        TypeError: ``t`` is not a float tensor.
    """
    codes, scales = affine.quantize_per_token(t)
    if t.dtype in (torch.float32, torch.float16):
        return codes, scales
    scales = scales.to(t.dtype)
    # Rounding the scale moved it: the codes have to follow.
    return affine.quantize(t, scales, qmin=-127, qmax=127), scales


def per_token_dynamic_quant(input: Tensor) -> Tensor:  # noqa: A002 - torchao's name
    """Round to asymmetric int8 per token and back: what a dynamic int8 activation loses.

    Args:
        input: float, ``[..., K]``.

    Returns:
        Shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a float tensor.
    """
    scale, zero = affine.choose_affine(input, qmin=-128, qmax=127)  # [..., 1]
    codes = affine.quantize(input, scale, qmin=-128, qmax=127, zero_point=zero)
    return affine.dequantize(codes, scale, zero_point=zero, dtype=input.dtype)


def dynamically_quantize_per_channel(
    x: Tensor, quant_min: int, quant_max: int, target_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric quantization with one scale a row, ``absmax / ((quant_max - quant_min) / 2)``.

    Args:
        x: float, ``[N, K]``.
        quant_min: lowest code.
        quant_max: highest code.
        target_dtype: integer dtype of the codes.

    Returns:
        ``(codes, scale, zero_point)``: ``[N, K]``; ``[N]`` in ``x.dtype``, rounded to it before the
        codes are taken; int64 zeros ``[N]``.

    Raises:
        TypeError: ``x`` is not a float tensor.
        ValueError: not 2-D, a range the dtype cannot hold, or one without both signs.
    """
    if x.dim() != 2:
        raise ValueError(f"per-channel quantization takes [N, K]; got shape {tuple(x.shape)}")
    _check_signed(quant_min, quant_max)
    scale = affine.choose_symmetric(x, qmin=quant_min, qmax=quant_max).to(x.dtype)
    codes = affine.quantize(x, scale, qmin=quant_min, qmax=quant_max, dtype=target_dtype)
    return codes, scale.squeeze(-1), x.new_zeros(x.shape[0], dtype=torch.int64)


def dequantize_per_tensor(
    int_repr: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(int_repr - zero_point) * scale``, shaped as ``int_repr``.

    Args:
        int_repr: integer codes, any shape.
        scale: float, ``[1]`` or a scalar.
        zero_point: integers shaped as ``scale``, or None for 0.
        out_dtype: of the result, unless ``scale`` is wider and no scalar: then they promote.
    """
    wide = int_repr.to(torch.promote_types(out_dtype, torch.float32))
    steps = wide if zero_point is None else wide - zero_point
    promoted = torch.promote_types(out_dtype, scale.dtype) if scale.dim() else out_dtype
    return (steps * scale).to(promoted)


def dequantize_per_channel(
    int_repr: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(int_repr - zero_points) * scales``, one of each a row.

    Args:
        int_repr: integer codes, ``[N, K]``.
        scales: float, ``[N]``.
        zero_points: integers, ``[N]``, or None for 0.
        out_dtype: of the result, unless ``scales`` are wider: then they promote.

    Raises:
        ValueError: shapes other than these.
    """
    if int_repr.dim() != 2 or scales.shape != int_repr.shape[:1]:
        shapes = f"codes {tuple(int_repr.shape)} and scales {tuple(scales.shape)}"
        raise ValueError(f"per-channel codes are [N, K] with scales [N]; got {shapes}")
    zeros = None if zero_points is None else zero_points.unsqueeze(-1)
    return dequantize_per_tensor(int_repr, scales.unsqueeze(-1), zeros, out_dtype)


def _check_signed(quant_min: int, quant_max: int) -> None:
    if not quant_min < 0 < quant_max:
        raise ValueError(
            f"symmetric codes in [{quant_min}, {quant_max}] would lose a sign; give a range around "
            "0 or quantize affinely"
        )
