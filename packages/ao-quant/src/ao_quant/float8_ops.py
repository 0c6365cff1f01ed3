"""The linears of the float8 schemes (e4m3: largest 448): references, and torch's own kernels.

``float8_weight_linear``: float activations times float8 weights.
``float8_dynamic_linear``: activations scaled and rounded to float8 as they come, times float8 weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ao_core import Kernel, Key, Op
from ao_quant.decoded import fake, linear_by_rows, linear_float32, rejects_device
from ao_quant.int8_ops import check_input

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest finite float8 of this format."""
SMALLEST_ABSMAX = 1e-12
"""What an absmax counts as at least: zeros become zeros."""


def quantize_float8(x: torch.Tensor, *, rowwise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``(codes, scale)`` with ``x ≈ codes * scale``: scale is ``max(absmax, 1e-12) / 448``, in float32.

    Args:
        x: float ``[..., K]``.
        rowwise: one scale for each row, else one for all of ``x``.

    Returns:
        float8_e4m3fn ``[..., K]``, float32 ``[..., 1]`` (all dimensions 1 for one scale). A row with
        infinity or NaN gets that as its scale.
    """
    magnitude = x.detach().abs()
    if magnitude.numel() == 0:  # amax knows no maximum of nothing
        shape = (*x.shape[:-1], 1) if rowwise else (1,) * x.ndim
        return magnitude.to(FLOAT8), torch.ones(shape, device=x.device)
    largest = magnitude.amax(-1, keepdim=True) if rowwise else magnitude.amax().view((1,) * x.ndim)
    scale = largest.float().clamp_min(SMALLEST_ABSMAX) / LARGEST
    codes = (x.detach().float() / scale).clamp_(-LARGEST, LARGEST).to(FLOAT8)
    return codes, scale


def weight_linear_reference(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x @ (codes * scale).T + bias`` in float32, cast to the dtype of ``x`` once.

    Args:
        x: float ``[..., K]``.
        codes: float8_e4m3fn ``[N, K]``.
        scale: float32 ``[N, 1]`` or ``[1, 1]``.
        bias: float ``[N]`` or None.
    """
    check_input(x, codes)
    return linear_float32(x, codes.float() * scale, bias)


def dynamic_linear_reference(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, rowwise: bool
) -> torch.Tensor:
    """The dequantized activations times the dequantized weight, in float32.

    Args and result as :func:`weight_linear_reference`.
        rowwise: one scale for each row of ``x``, else one for all of it.
    """
    check_input(x, codes)
    x_codes, x_scale = quantize_float8(x, rowwise=rowwise)
    out = F.linear(x_codes.float(), codes.float()) * x_scale * scale.view(-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def weight_linear_torch(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Weights cast by torch, then its float matmul."""
    check_input(x, codes)
    if x.dtype == torch.bfloat16:
        # Codes are exact in bfloat16, so the result is scaled, not the weight; float16 could overflow.
        out = linear_by_rows(x, codes.shape[0], None, lambda rows: codes[rows].bfloat16())
        out *= scale.view(-1)
        return out if bias is None else out.add_(bias)

    def decode(rows: slice) -> torch.Tensor:
        each = scale if scale.shape[0] == 1 else scale[rows]
        return (codes[rows].float() * each).to(x.dtype)

    return linear_by_rows(x, codes.shape[0], bias, decode)


def dynamic_linear_torch(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, rowwise: bool
) -> torch.Tensor:
    """``torch._scaled_mm`` on CUDA for half precision; else a float matmul on the codes."""
    check_input(x, codes)
    x_codes, x_scale = quantize_float8(x, rowwise=rowwise)
    # The float8 matmul sums in fewer bits than float32 has: it is not for float32 activations.
    if x.device.type == "cuda" and x.dtype != torch.float32 and x.numel():
        flat = x_codes.view(-1, codes.shape[1])
        if x.dtype == torch.float16:  # bfloat16, which row scales come with, has three bits less
            one = torch.ones((), device=x.device)
            out = _scaled_mm(flat, one, codes, one, torch.float32) * (x_scale.reshape(-1, 1) * scale.view(-1))
        else:
            out = _scaled_mm(flat, x_scale, codes, scale, torch.bfloat16)
        out = out.view(*x.shape[:-1], codes.shape[0])
    else:
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32  # exact in both
        out = linear_by_rows(x_codes.to(dtype), codes.shape[0], None, lambda rows: codes[rows].to(dtype))
        out = out.float() * (x_scale * scale.view(-1))
    return (out if bias is None else out.add_(bias)).to(x.dtype)


_MULTIPLE = 16  # what _scaled_mm asks of K and N


def _scaled_mm(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``[M, N]`` in ``dtype`` of float8 ``[M, K]`` and ``[N, K]``; refused shapes get zeros around."""
    n = codes.shape[0]
    more_n, more_k = (-size % _MULTIPLE for size in codes.shape)
    if more_k:
        x_codes = _padded(x_codes, more_k, 0)
    if more_n or more_k:
        codes = _padded(codes, more_k, more_n)
    one = x_scale.numel() == 1 and scale.numel() == 1
    if one:
        scales = x_scale.view(()), scale.view(())
    else:
        rows = x_scale.reshape(-1, 1).expand(x_codes.shape[0], 1)
        columns = scale.view(1, -1).expand(1, n)
        scales = rows.contiguous(), F.pad(columns, (0, more_n), value=1.0).contiguous()
    out = torch._scaled_mm(
        x_codes.contiguous(),
        codes.contiguous().t(),
        *scales,
        out_dtype=dtype,
        use_fast_accum=dtype == torch.bfloat16,
    )
    return out[:, :n].contiguous() if more_n else out


def _padded(codes: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    """Zeros to the right and below; padding knows no float8, but all-zero bits are zero."""
    return F.pad(codes.view(torch.uint8), (0, columns, 0, rows)).view(FLOAT8)


def _rejects_dynamic(key: Key) -> str | None:
    if key.device.type == "cuda" and key.capability < (8, 9):
        major, minor = key.capability
        return f"the float8 matmul needs compute capability 8.9, and this device has {major}.{minor}"
    return rejects_device(key)


def _samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 576, 192), (3, 100, 17), (17, 63, 1), (2, 1, 5), (49, 576, 224), (4, 64, 32), (0, 64, 8)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, k, n in shapes:
            for scales in (n, 1):
                x = torch.randn(rows, k, generator=generator).to(dtype)
                codes = (torch.randn(n, k, generator=generator) * 100).clamp_(-LARGEST, LARGEST)
                scale = torch.rand(scales, 1, generator=generator) / 100 + 1e-3
                bias = torch.randn(n, generator=generator).to(dtype) if rows % 2 else None
                parts = (x, codes.to(FLOAT8), scale, bias)
                yield tuple(None if part is None else part.to(device) for part in parts)


def weight_linear_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``float8_weight_linear`` in awkward sizes, with one scale and one scale a row."""
    yield from _samples(device)


def dynamic_linear_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``float8_dynamic_linear`` in awkward sizes."""
    for args in _samples(device):
        yield (*args, args[2].shape[0] > 1)


def weight_linear_problem(x: torch.Tensor, n: int, seed: int) -> tuple[Any, ...]:
    """``float8_weight_linear`` of ``x`` ``[M, K]`` with random weights ``[n, K]``, one scale a row."""
    generator = torch.Generator(x.device).manual_seed(seed)
    codes = (torch.randn(n, x.shape[-1], generator=generator, device=x.device) * 9).to(FLOAT8)
    scale = torch.rand(n, 1, generator=generator, device=x.device) / 100 + 1e-3
    return x, codes, scale, None


def dynamic_linear_problem(x: torch.Tensor, n: int, seed: int) -> tuple[Any, ...]:
    """The same for ``float8_dynamic_linear``, activations scaled row by row."""
    return (*weight_linear_problem(x, n, seed), True)


FLOAT8_WEIGHT_LINEAR = Op(
    "float8_weight_linear",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor",
    reference=weight_linear_reference,
    fake=fake,
    samples=weight_linear_samples,
    problem=weight_linear_problem,
)
FLOAT8_DYNAMIC_LINEAR = Op(
    "float8_dynamic_linear",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, bool rowwise) -> Tensor",
    reference=dynamic_linear_reference,
    fake=fake,
    samples=dynamic_linear_samples,
    problem=dynamic_linear_problem,
)

KERNELS = [
    Kernel("float8_weight_linear", "torch", weight_linear_torch, rejects=rejects_device),
    Kernel("float8_dynamic_linear", "torch", dynamic_linear_torch, rejects=_rejects_dynamic),
]
