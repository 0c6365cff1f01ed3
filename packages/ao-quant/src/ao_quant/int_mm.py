"""The exact int8 matrix product that the int8 schemes stand on."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F

# cuBLASLt, as torch calls it: more than 16 rows, inner and output sizes in multiples of 8.
_CUDA_ROWS = 17
_CUDA_MULTIPLE = 8

# 1024 products of at most 128 * 128 add up to 2 ** 24, the last integer that float32 counts to.
_FLOAT_COLUMNS = 1024


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated in int32, exact on every device for every shape, empty ones too.

    Runs where the operands are and never copies to another device. CUDA runs ``torch._int_mm``,
    with zeros around shapes that it refuses (a copy: keep K and N multiples of 8 on a hot path). A
    CPU runs it as it is, unless its int8 dot product saturates. There, and on any other device,
    float32 products over slices of K too short to round.

    Args:
        a: int8, ``[M, K]``, any strides.
        b: int8, ``[K, N]``, any strides, on the device of ``a``. Exact up to ``K = 131071``, beyond
            which int32 can wrap.

    Returns:
        int32, ``[M, N]``, contiguous.

    Raises:
        TypeError: an operand is not int8.
        ValueError: not 2-D, inner sizes that differ, or operands on two devices.
    """
    check_int8(a, b)
    a, b = _plain(a), _plain(b)
    if a.is_cuda:
        return _cuda_mm(a, b)
    if a.is_cpu and _cpu_is_exact():
        return torch._int_mm(a, b)
    return _float_mm(a, b)


def check_int8(a: Tensor, b: Tensor) -> None:
    """Raise unless both are int8 matrices that can be multiplied, on one device; see :func:`int_mm`."""
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"int_mm multiplies int8 by int8; got {a.dtype} and {b.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"int_mm multiplies [M, K] by [K, N]; got {shapes}")
    if a.device != b.device:
        raise ValueError(f"int_mm needs both on one device; got {a.device} and {b.device}")


def _plain(matrix: Tensor) -> Tensor:
    """The matrix with rows, or columns, that follow one another in memory.

    ``torch._int_mm`` reads beyond an operand whose rows overlap: an expanded one, and a single row
    that came of a transpose. ``contiguous()`` takes the latter for contiguous; a clone mends it.
    """
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    if (down >= columns) if across == 1 else (down == 1 and across >= rows):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _cuda_mm(a: Tensor, b: Tensor) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    if 0 in (m, k, n):
        return a.new_zeros(m, n, dtype=torch.int32)
    more_m = max(_CUDA_ROWS - m, 0)
    more_k, more_n = -k % _CUDA_MULTIPLE, -n % _CUDA_MULTIPLE
    rows, columns = a, b.t()  # [M, K], [N, K]: cuBLASLt refuses most shapes unless both run along K
    if more_m or more_k:
        rows = F.pad(rows, (0, more_k, 0, more_m))
    if more_k or more_n:
        columns = F.pad(columns, (0, more_k, 0, more_n))
    out = torch._int_mm(_aligned(rows), _aligned(columns).t())
    return out[:m, :n].contiguous()


def _aligned(matrix: Tensor) -> Tensor:
    """Contiguous, and starting where cuBLASLt can read: at a multiple of 16 bytes."""
    if matrix.storage_offset() % 16:
        return matrix.clone(memory_format=torch.contiguous_format)
    return matrix.contiguous()


def _float_mm(a: Tensor, b: Tensor) -> Tensor:
    total = a.new_zeros(a.shape[0], b.shape[1], dtype=torch.int32)
    for start in range(0, a.shape[1], _FLOAT_COLUMNS):
        columns = slice(start, start + _FLOAT_COLUMNS)
        product = a[:, columns].to(torch.float32) @ b[columns].to(torch.float32)
        total += product.to(torch.int32)
    return total


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cpu_is_exact() -> bool:
    # With oneDNN off, as torch.export has it, a probe would say nothing about the day it is on.
    return bool(torch.backends.mkldnn.enabled) and _probe_cpu()


@functools.cache
def _probe_cpu() -> bool:
    """Whether ``torch._int_mm`` is exact here.

    On x86 without VNNI (AVX2, the first AVX-512) oneDNN adds pairs of products in a saturating
    int16, for every shape with K > 1: one product of large values tells.
    """
    # A thread of its own has none of the caller's modes (fake tensors, while exporting).
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(_largest_product_is_right).result()


def _largest_product_is_right() -> bool:
    row = torch.full((1, 64), 127, dtype=torch.int8)
    return int(torch._int_mm(row, row.t())) == 64 * 127 * 127
