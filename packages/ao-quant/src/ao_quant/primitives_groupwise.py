"""Group-wise affine codes of 2 to 8 bits around a float midpoint, for tinygemm."""

from __future__ import annotations

import torch
from torch import Tensor

from ao_core.numerics import affine


def get_groupwise_affine_qparams(w: Tensor, n_bit: int = 4, groupsize: int = 128) -> tuple[Tensor, Tensor]:
    """Scales and float midpoints: ``w ≈ (code - 2 ** (n_bit - 1)) * scale + zero``.

    Codes are ``[0, 2 ** n_bit)``; they span the group's own range, not widened to hold 0, at least
    1e-6 wide.

    Args:
        w: float, ``[N, K]``.
        n_bit: 2 to 8.
        groupsize: input columns a group, at least 2, a divisor of K; K itself if larger than K.

    Returns:
        ``(scales, zeros)``, bfloat16 ``[N, K / groupsize]``; a zero is the group's middle, in
        weight units.

    Raises:
        TypeError: ``w`` is not a float tensor.
        ValueError: not 2-D, or a bad ``groupsize`` or ``n_bit``.
    """
    if not w.is_floating_point():
        raise TypeError(f"expected float weights; got {w.dtype}")
    size = group_columns(w.shape, n_bit, groupsize)
    groups = w.detach().reshape(w.shape[0], -1, size).to(torch.float32)  # [N, G, g]
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low).clamp_min(1e-6) / (2**n_bit - 1)
    zeros = low + scales * 2 ** (n_bit - 1)
    return scales.to(torch.bfloat16), zeros.to(torch.bfloat16)


def groupwise_affine_quantize_tensor_from_qparams(
    w: Tensor, scales: Tensor, zeros: Tensor, n_bit: int = 4, groupsize: int = 128
) -> Tensor:
    """Codes ``clamp(round((w - (zero - 2 ** (n_bit - 1) * scale)) / scale), 0, 2 ** n_bit - 1)``.

    Args:
        w: float, ``[N, K]``; with one group, any columns of it, a single one too (GPTQ).
        scales: ``[N, G]``.
        zeros: ``[N, G]``, in weight units.
        n_bit: 2 to 8.
        groupsize: as chosen.

    Returns:
        int32, ``[N, K]``.

    Raises:
        TypeError: ``w`` is not a float tensor.
        ValueError: shapes that do not fit, or a bad ``groupsize`` or ``n_bit``.
    """
    if not w.is_floating_point():
        raise TypeError(f"expected float weights; got {w.dtype}")
    scale, zero = _columns(w, scales, zeros, n_bit, groupsize)
    # The half is added last: next to a large zero, half a range of scales would be rounded away.
    steps: Tensor = (w.detach().to(torch.float32) - zero) / scale + 2 ** (n_bit - 1)
    return steps.round_().clamp_(0, 2**n_bit - 1).to(torch.int32)


def groupwise_affine_dequantize_tensor_from_qparams(
    w_int4x8: Tensor, scales: Tensor, zeros: Tensor, n_bit: int = 4, groupsize: int = 128
) -> Tensor:
    """``(code - 2 ** (n_bit - 1)) * scale + zero`` in float32, then one cast.

    Args:
        w_int4x8: integer codes, ``[N, K]``, or one column with one group.
        scales: ``[N, G]``.
        zeros: ``[N, G]``, in weight units.
        n_bit: 2 to 8.
        groupsize: as chosen.

    Returns:
        ``[N, K]`` in the dtype of ``scales``.

    Raises:
        ValueError: shapes that do not fit, or a bad ``groupsize`` or ``n_bit``.
    """
    scale, zero = _columns(w_int4x8, scales, zeros, n_bit, groupsize)
    values: Tensor = (w_int4x8.to(torch.float32) - 2 ** (n_bit - 1)) * scale + zero
    return values.to(scales.dtype)


def pack_tinygemm_scales_and_zeros(scales: Tensor, zeros: Tensor) -> Tensor:
    """``[N, G]`` and ``[N, G]`` to ``[G, N, 2]``, contiguous, for ``torch._weight_int4pack_mm``.

    Args:
        scales: bfloat16, ``[N, G]``.
        zeros: bfloat16, ``[N, G]``.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that differ or are not 2-D.
    """
    if scales.dtype != torch.bfloat16 or zeros.dtype != torch.bfloat16:
        raise TypeError(f"tinygemm takes bfloat16 qparams; got {scales.dtype} and {zeros.dtype}")
    if scales.dim() != 2 or scales.shape != zeros.shape:
        shapes = f"{tuple(scales.shape)} and {tuple(zeros.shape)}"
        raise ValueError(f"scales and zeros are both [N, G]; got {shapes}")
    return torch.stack((scales, zeros), -1).transpose(0, 1).contiguous()


def unpack_tinygemm_scales_and_zeros(scales_and_zeros: Tensor) -> tuple[Tensor, Tensor]:
    """``[G, N, 2]`` to ``(scales, zeros)``, ``[N, G]`` each: the inverse of packing, as views.

    Args:
        scales_and_zeros: ``[G, N, 2]``.

    Raises:
        ValueError: another shape.
    """
    if scales_and_zeros.dim() != 3 or scales_and_zeros.shape[2] != 2:
        raise ValueError(f"expected [G, N, 2]; got shape {tuple(scales_and_zeros.shape)}")
    scales, zeros = scales_and_zeros.transpose(0, 1).unbind(-1)
    return scales, zeros


def groupwise_affine_quantize_tensor(
    w: Tensor, n_bit: int = 4, groupsize: int = 128
) -> tuple[Tensor, Tensor]:
    """Choose qparams, quantize, pack the qparams for tinygemm.

    Args:
        w: float, ``[N, K]``.
        n_bit: 2 to 8.
        groupsize: see ``get_groupwise_affine_qparams``, its errors too.

    Returns:
        ``(codes, scales_and_zeros)``: int32 ``[N, K]``, bfloat16 ``[G, N, 2]``.
    """
    scales, zeros = get_groupwise_affine_qparams(w, n_bit, groupsize)
    codes = groupwise_affine_quantize_tensor_from_qparams(w, scales, zeros, n_bit, groupsize)
    return codes, pack_tinygemm_scales_and_zeros(scales, zeros)


def groupwise_affine_dequantize_tensor(
    w_int4x8: Tensor, scales_and_zeros: Tensor, n_bit: int = 4, groupsize: int = 128
) -> Tensor:
    """The inverse of ``groupwise_affine_quantize_tensor``, up to rounding.

    Args:
        w_int4x8: integer codes, ``[N, K]``.
        scales_and_zeros: ``[G, N, 2]``.
        n_bit: 2 to 8.
        groupsize: as chosen.

    Returns:
        ``[N, K]`` in the dtype of ``scales_and_zeros``.

    Raises:
        ValueError: shapes that do not fit, or a bad ``groupsize`` or ``n_bit``.
    """
    scales, zeros = unpack_tinygemm_scales_and_zeros(scales_and_zeros)
    return groupwise_affine_dequantize_tensor_from_qparams(w_int4x8, scales, zeros, n_bit, groupsize)


def group_columns(shape: torch.Size, n_bit: int, groupsize: int) -> int:
    """Columns that one group takes of a weight ``[N, K]``: ``groupsize``, or K if that is less.

    Args:
        shape: of the weight.
        n_bit: bits a code.
        groupsize: as asked for.

    Raises:
        ValueError: ``n_bit`` beyond 2 to 8, not 2-D, or a ``groupsize`` that does not divide K.
    """
    if not 2 <= n_bit <= 8:
        raise ValueError(f"n_bit is 2 to 8; got {n_bit}")
    if len(shape) != 2:
        raise ValueError(f"group-wise weights are [N, K]; got shape {tuple(shape)}")
    if groupsize < 2:
        raise ValueError(f"groupsize is at least 2; got {groupsize}")
    size = min(groupsize, shape[1])
    if size == 0 or shape[1] % size:
        raise ValueError(f"groupsize {groupsize} does not divide {shape[1]} columns; pad them")
    return size


def _columns(
    values: Tensor, scales: Tensor, zeros: Tensor, n_bit: int, groupsize: int
) -> tuple[Tensor, Tensor]:
    """``[N, G]`` of each to float32 ``[N, K]``."""
    size = group_columns(values.shape, n_bit, groupsize)
    rows, columns = values.shape
    shape = (rows, columns // size)
    if scales.shape != shape or zeros.shape != shape:
        found = f"{tuple(scales.shape)} and {tuple(zeros.shape)}"
        raise ValueError(f"scales and zeros of {rows} rows in groups of {size}: {shape}; got {found}")
    scale = affine.expand_groups(scales.to(torch.float32), columns, size)
    return scale, affine.expand_groups(zeros.to(torch.float32), columns, size)
