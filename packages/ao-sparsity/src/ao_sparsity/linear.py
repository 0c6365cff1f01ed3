"""The linears of 2:4 weights in the layout that every device reads: references, and torch's operators.

``semi_sparse_linear``: float values. ``semi_sparse_int8_linear``: int8 values and int8 activations, one
scale a token, exact in integers. The weight is decompressed for each product: this saves bytes, not time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ao_core import Kernel, Key, Op
from ao_core.numerics import affine
from ao_sparsity.masks import least_of_groups
from ao_sparsity.packed24 import compress, decompress

_ELEMENTS = 1 << 20  # decompressed at a time on a CPU: 4 MB of float32


def linear_reference(
    x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x @ weight.T + bias`` in float32, cast to the dtype of ``x`` once.

    Args:
        x: float ``[..., K]``.
        values: float ``[N, 2 G]``, see :mod:`ao_sparsity.packed24`.
        indices: uint8 ``[N, ceil(G / 2)]``.
        bias: float ``[N]`` or None.
    """
    weight = decompress(values, indices, x.shape[-1]).float()
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def int8_linear_reference(
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Per-token symmetric int8 activations times 2:4 int8 weights; the sum is exact.

    Args and result as :func:`linear_reference`, with int8 values and ``scale`` float32 ``[N, 1]``.
    """
    return int8_product(x, decompress(values, indices, x.shape[-1]), scale, bias)


def int8_product(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x``, quantized token by token, times ``codes`` int8 ``[N, K]`` with a scale a row; exact sums."""
    x_codes, x_scale = affine.quantize_per_token(x)  # int8 [..., K], float32 [..., 1]
    products = x_codes.double() @ codes.double().t()  # exact: below 2**53
    out = products.float() * x_scale * scale.view(-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_torch(
    x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Torch's float matmul on some decompressed rows at a time, in the dtype of ``x``."""
    _check_input(x, values)
    out = x.new_empty(*x.shape[:-1], values.shape[0])
    for rows in _slices(x, values):
        weight = decompress(values[rows], indices[rows], x.shape[-1]).to(x.dtype)
        out[..., rows] = F.linear(x, weight, None if bias is None else bias[rows].to(x.dtype))
    return out


def int8_linear_torch(
    x: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Float32 products of integers, over slices of K too short to round."""
    _check_input(x, values)
    x_codes, x_scale = affine.quantize_per_token(x)
    out = x.new_empty(*x.shape[:-1], values.shape[0])
    columns = x.shape[-1]
    for rows in _slices(x, values):
        weight = decompress(values[rows], indices[rows], columns)
        sums = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=torch.int32, device=x.device)
        for start in range(0, columns, 1024):  # 1024 products of at most 127 * 128 are below 2 ** 24
            part = slice(start, start + 1024)
            sums += F.linear(x_codes[..., part].float(), weight[:, part].float()).to(torch.int32)
        scaled = sums.float() * x_scale * scale[rows].view(-1)
        out[..., rows] = (scaled if bias is None else scaled + bias[rows].float()).to(x.dtype)
    return out


def _slices(x: torch.Tensor, values: torch.Tensor) -> Iterator[slice]:
    rows = values.shape[0]
    step = max(_ELEMENTS // max(x.shape[-1], 1), 1) if x.device.type == "cpu" else rows
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _check_input(x: torch.Tensor, values: torch.Tensor) -> None:
    columns = 2 * values.shape[1]
    if not columns - 4 < x.shape[-1] <= columns:
        raise RuntimeError(
            f"a 2:4 linear with {columns - 3} to {columns} input features was given an input "
            f"{tuple(x.shape)}; its last dimension must match."
        )


def _rejects(key: Key) -> str | None:
    if key.device.type not in ("cpu", "cuda"):
        return f"it runs on cpu and cuda, not on {key.device.type}"
    return None


def _fake(x: torch.Tensor, values: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def pruned_gaussian(n: int, k: int, seed: int) -> torch.Tensor:
    """A random 2:4 matrix ``[n, k]``, float32."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return weight.masked_fill(least_of_groups(weight.abs(), 2, 4), 0)


def int8_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``codes`` int8 ``[..., N, K]`` and ``scale`` float32 ``[..., N, 1]``; zeros stay zero."""
    scale = affine.choose_symmetric(weight, qmin=-127, qmax=127)
    return affine.quantize(weight, scale, qmin=-127, qmax=127), scale


_SIZES = [(1, 576, 192), (3, 100, 17), (17, 63, 1), (2, 1, 5), (40, 128, 64), (33, 1100, 3), (0, 64, 8)]


def linear_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``semi_sparse_linear`` in awkward sizes."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, k, n in _SIZES:
            x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
            bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) if rows % 2 else None
            parts = (x, *compress(pruned_gaussian(n, k, k).to(dtype)), bias)
            yield tuple(None if part is None else part.to(device) for part in parts)


def int8_linear_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``semi_sparse_int8_linear`` in awkward sizes."""
    for (x, _, _, bias), (_, k, n) in zip(linear_samples(device), 3 * _SIZES, strict=True):
        codes, scale = int8_codes(pruned_gaussian(n, k, k).to(device))
        yield (x, *compress(codes), scale, bias)


SEMI_SPARSE_LINEAR = Op(
    "semi_sparse_linear",
    "(Tensor x, Tensor values, Tensor indices, Tensor? bias) -> Tensor",
    reference=linear_reference,
    fake=_fake,
    samples=linear_samples,
)
SEMI_SPARSE_INT8_LINEAR = Op(
    "semi_sparse_int8_linear",
    "(Tensor x, Tensor values, Tensor indices, Tensor scale, Tensor? bias) -> Tensor",
    reference=int8_linear_reference,
    fake=_fake,
    samples=int8_linear_samples,
)
KERNELS = [
    Kernel("semi_sparse_linear", "torch", linear_torch, rejects=_rejects),
    Kernel("semi_sparse_int8_linear", "torch", int8_linear_torch, rejects=_rejects),
]
