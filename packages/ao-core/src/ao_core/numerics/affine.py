"""Uniform quantization: ``weight ≈ (code - zero_point) * scale``, one scale per group of columns.

Weights are ``[..., N, K]`` and their qparams ``[..., N, G]``: ``G == 1`` covers every column given,
otherwise group ``g`` covers columns ``[g * group_size, (g + 1) * group_size)`` and the last group
may be shorter. All arithmetic is float32, whatever the storage dtype. Rounding is half to even.
NaN is not looked for (that would synchronize a GPU): it ends in the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FLOAT32_EPS = torch.finfo(torch.float32).eps

# Below this absmax / 127 is a subnormal number, too coarse to keep codes within [-127, 127].
_SMALLEST_EPS = 127 * torch.finfo(torch.float32).tiny


def choose_symmetric(
    weight: Tensor,
    *,
    qmin: int,
    qmax: int,
    group_size: int = -1,
    eps: float = FLOAT32_EPS,
) -> Tensor:
    """Scale for codes in ``[qmin, qmax]`` around zero: ``absmax / ((qmax - qmin) / 2)``.

    torchao's convention: ``absmax / 127.5`` for ``[-128, 127]``, ``/ 127`` for ``[-127, 127]``.

    Args:
        weight: float, ``[..., N, K]``.
        qmin: lowest code.
        qmax: highest code.
        group_size: columns that share a scale; -1 takes all of them as one group.
        eps: smallest scale, in weight units; what a group of zeros gets.

    Returns:
        float32 ``[..., N, G]`` with ``G = ceil(K / group_size)``, at least 1.

    Raises:
        TypeError: ``weight`` is not a float tensor.
        ValueError: an empty code range or a bad ``group_size``.
    """
    _check_range(qmin, qmax)
    groups = _grouped(weight, group_size)  # [..., N, G, g]
    absmax = groups.abs().amax(-1).to(torch.float32)
    return (absmax / ((qmax - qmin) / 2)).clamp_min_(eps)


def choose_affine(
    weight: Tensor,
    *,
    qmin: int,
    qmax: int,
    group_size: int = -1,
    eps: float = FLOAT32_EPS,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that map ``[min(weight, 0), max(weight, 0)]`` onto ``[qmin, qmax]``.

    The range is widened to hold 0, so that 0 is stored exactly. Arguments and errors are those of
    ``choose_symmetric``.

    Returns:
        ``(scale, zero_point)``, both ``[..., N, G]``: float32, and int32 within ``[qmin, qmax]``.
    """
    _check_range(qmin, qmax)
    groups = _grouped(weight, group_size)  # [..., N, G, g]
    low = groups.amin(-1).to(torch.float32).clamp_max_(0)
    high = groups.amax(-1).to(torch.float32).clamp_min_(0)
    scale = ((high - low) / (qmax - qmin)).clamp_min_(eps)
    zero_point = (qmin - torch.round(low / scale)).clamp_(qmin, qmax)
    return scale, zero_point.to(torch.int32)


def quantize(
    weight: Tensor,
    scale: Tensor,
    *,
    qmin: int,
    qmax: int,
    zero_point: Tensor | None = None,
    group_size: int = -1,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """Codes ``clamp(round(weight / scale) + zero_point, qmin, qmax)``.

    Args:
        weight: float, ``[..., N, K]``: all columns, one group of them, or a single one.
        scale: ``[..., N, G]``, as many dims as ``weight``.
        qmin: lowest code.
        qmax: highest code.
        zero_point: integers, shaped as ``scale``, or None for 0.
        group_size: needed where ``G > 1``.
        dtype: integer dtype of the codes; must hold ``qmin`` and ``qmax``.

    Returns:
        ``[..., N, K]`` in ``dtype``.

    Raises:
        TypeError: ``weight`` is not a float tensor.
        ValueError: qparams that do not fit the columns, or a code range that ``dtype`` cannot hold.
    """
    _check_range(qmin, qmax, dtype)
    _check_weight(weight)
    codes = weight.detach().to(torch.float32) / _per_column(scale, weight, group_size)
    codes.round_()
    if zero_point is not None:
        codes += _per_column(zero_point, weight, group_size)
    return codes.clamp_(qmin, qmax).to(dtype)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    group_size: int = -1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(codes - zero_point) * scale`` in float32, then one cast to ``dtype``.

    Args:
        codes: integers, ``[..., N, K]``.
        scale: ``[..., N, G]``, as many dims as ``codes``.
        zero_point: integers, shaped as ``scale``, or None for 0.
        group_size: needed where ``G > 1``.
        dtype: of the result.

    Returns:
        ``[..., N, K]`` in ``dtype``.

    Raises:
        ValueError: qparams that do not fit the columns.
    """
    steps = codes.to(torch.float32)
    if zero_point is not None:
        steps = steps - _per_column(zero_point, codes, group_size)
    return (steps * _per_column(scale, codes, group_size)).to(dtype)


def expand_groups(qparam: Tensor, columns: int, group_size: int = -1) -> Tensor:
    """``[..., G] -> [..., columns]``: each column's own value.

    ``G == 1`` gives a view without memory of its own, whatever ``group_size`` is.

    Args:
        qparam: any dtype, ``[..., G]``.
        columns: K.
        group_size: columns a group, needed where ``G > 1``.

    Raises:
        ValueError: ``G > 1`` and ``ceil(columns / group_size) != G``.
    """
    groups = qparam.shape[-1]
    if groups == 1:
        return qparam.expand(*qparam.shape[:-1], columns)
    if group_size < 1:
        raise ValueError(f"{groups} groups need the group_size they were chosen with, above 0")
    if -(-columns // group_size) != groups:
        raise ValueError(
            f"{columns} columns in groups of {group_size} are {-(-columns // group_size)} groups, "
            f"but the qparams have {groups}; pass the group_size they were chosen with"
        )
    return qparam.repeat_interleave(group_size, -1)[..., :columns]


def quantize_per_token(x: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Symmetric int8 activations with one scale a row: ``scale = max(absmax, eps) / 127``.

    Exact: float32 arithmetic whatever ``x.dtype``. A row with Inf or NaN gets that as its scale, so
    a product scaled back stays non-finite instead of looking sane.

    Args:
        x: float, ``[..., K]``.
        eps: smallest absmax, in activation units, at least 1.5e-36; a row of zeros becomes zeros.

    Returns:
        ``(codes, scale)``: int8 ``[..., K]`` within [-127, 127], float32 ``[..., 1]``.

    Raises:
        TypeError: ``x`` is not a float tensor.
        ValueError: ``eps`` too small.

    Source: the per-token scheme of ZeroQuant (arXiv:2206.01861) and SmoothQuant (arXiv:2211.10438).
    """
    if eps < _SMALLEST_EPS:
        raise ValueError(f"eps={eps} is too small for float32; use {_SMALLEST_EPS:.2g} or more")
    _check_weight(x)
    rows = x.detach().to(torch.float32)
    if rows.shape[-1] == 0:  # amax knows no maximum of nothing
        return rows.to(torch.int8), rows.new_full((*rows.shape[:-1], 1), eps / 127)
    # abs().amax() and not vector_norm(inf): five times faster at 256 rows on a CPU with AVX-512.
    scale = rows.abs().amax(-1, keepdim=True).clamp_min_(eps).div_(127)
    return (rows / scale).round_().to(torch.int8), scale


def _check_weight(weight: Tensor) -> None:
    if not weight.is_floating_point() or weight.dim() == 0:
        found = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise TypeError(f"expected a float tensor with columns; got {found}")


def _check_range(qmin: int, qmax: int, dtype: torch.dtype | None = None) -> None:
    if qmin >= qmax:
        raise ValueError(f"code range [{qmin}, {qmax}] is empty; qmin must be less than qmax")
    if dtype is None:
        return
    info = torch.iinfo(dtype)
    if qmin < info.min or qmax > info.max:
        raise ValueError(
            f"{dtype} holds [{info.min}, {info.max}], not codes in [{qmin}, {qmax}]; pass a wider dtype"
        )


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """``[..., K] -> [..., G, g]``, the last group filled up with zeros."""
    _check_weight(weight)
    if group_size < 1 and group_size != -1:
        raise ValueError(f"group_size is a positive column count or -1 for all; got {group_size}")
    columns = weight.shape[-1]
    size = max(columns, 1) if group_size == -1 else min(group_size, max(columns, 1))
    groups = max(-(-columns // size), 1)
    if groups * size != columns:
        # Zeros are free: absmax ignores them, and an affine range holds 0 anyway.
        weight = F.pad(weight, (0, groups * size - columns))
    return weight.detach().reshape(*weight.shape[:-1], groups, size)


def _per_column(qparam: Tensor, values: Tensor, group_size: int) -> Tensor:
    if qparam.dim() != values.dim():
        raise ValueError(
            f"qparams of shape {tuple(qparam.shape)} do not fit values of shape "
            f"{tuple(values.shape)}; keep the column dim, also for a single column ([N, 1])"
        )
    return expand_groups(qparam.to(torch.float32), values.shape[-1], group_size)
