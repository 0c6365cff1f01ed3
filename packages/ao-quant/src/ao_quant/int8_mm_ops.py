"""int8 matrix products as ops: exact, and with scales.

``int8_mm``: ``a @ b`` in int32. ``int8_scaled_mm``: the same, times a scale for each row and each column,
plus a bias, in a float dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ao_core import Kernel, Op
from ao_quant.decoded import rejects_device
from ao_quant.int_mm import int_mm


def mm_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in int32, exact up to K = 131071.

    Args:
        a: int8 ``[M, K]``.
        b: int8 ``[K, N]``.
    """
    return (a.double() @ b.double()).to(torch.int32)  # exact: below 2**53


def scaled_mm_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(a @ b) * row_scale * column_scale + bias`` in float32, cast to ``dtype`` once.

    Args:
        a: int8 ``[M, K]``.
        b: int8 ``[K, N]``.
        row_scale: float ``[M]``.
        column_scale: float ``[N]`` or None.
        bias: float ``[N]`` or None.
        dtype: of the result, a float one.
    """
    return _scaled(mm_reference(a, b), row_scale, column_scale, bias, dtype)


def scaled_mm_torch(
    a: torch.Tensor,
    b: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Torch's int8 matmul, scales applied in float32."""
    return _scaled(int_mm(a, b), row_scale, column_scale, bias, dtype)


def _scaled(
    sums: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    out = sums.float() * row_scale.float().unsqueeze(1)
    if column_scale is not None:
        out *= column_scale.float()
    if bias is not None:
        out += bias.float()
    return out.to(dtype)


def _mm_fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.int32)


def _scaled_mm_fake(a: torch.Tensor, b: torch.Tensor, *rest: Any) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=rest[-1])


_SIZES = [
    (1, 17, 63),
    (17, 64, 32),
    (3, 1, 5),
    (40, 576, 33),
    (0, 64, 8),
    (18, 48, 1),
    (2, 100, 16),
]  # M, K, N


def mm_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``int8_mm`` in awkward sizes; ``b`` by rows and by columns."""
    generator = torch.Generator().manual_seed(0)
    for index, (m, k, n) in enumerate(_SIZES):
        a = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
        b = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8).t()
        yield a.to(device), (b if index % 2 else b.contiguous()).to(device)


def scaled_mm_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``int8_scaled_mm`` in awkward sizes, with and without scales of columns and bias."""
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for index, (a, b) in enumerate(mm_samples(device)):
            rows, columns, bias = (
                (torch.rand(size, generator=generator) / 1000 + 1e-4).to(device)
                for size in (a.shape[0], b.shape[1], b.shape[1])
            )
            yield a, b, rows, columns if index % 3 else None, bias if index % 2 else None, dtype


def mm_problem(x: torch.Tensor, n: int, seed: int) -> tuple[Any, ...]:
    """``int8_mm`` of ``x`` ``[M, K]``, rounded, and the transpose of random codes ``[n, K]``."""
    generator = torch.Generator(x.device).manual_seed(seed)
    shape = (n, x.shape[1])
    b = torch.randint(-128, 128, shape, generator=generator, device=x.device, dtype=torch.int8)
    return (x.float() * 30).round().clamp(-127, 127).to(torch.int8), b.t()


def scaled_mm_problem(x: torch.Tensor, n: int, seed: int) -> tuple[Any, ...]:
    """The same for ``int8_scaled_mm``, with scales of rows and columns, in the dtype of ``x``."""
    rows, columns = (torch.full((size,), 0.01, device=x.device) for size in (x.shape[0], n))
    return (*mm_problem(x, n, seed), rows, columns, None, x.dtype)


INT8_MM = Op(
    "int8_mm",
    "(Tensor a, Tensor b) -> Tensor",
    reference=mm_reference,
    fake=_mm_fake,
    samples=mm_samples,
    problem=mm_problem,
)
INT8_SCALED_MM = Op(
    "int8_scaled_mm",
    "(Tensor a, Tensor b, Tensor row_scale, Tensor? column_scale, Tensor? bias, ScalarType dtype) -> Tensor",
    reference=scaled_mm_reference,
    fake=_scaled_mm_fake,
    samples=scaled_mm_samples,
    problem=scaled_mm_problem,
)

KERNELS = [
    Kernel("int8_mm", "torch", int_mm, rejects=rejects_device),
    Kernel("int8_scaled_mm", "torch", scaled_mm_torch, rejects=rejects_device),
]
