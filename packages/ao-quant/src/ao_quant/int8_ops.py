"""The linears of the int8 schemes: references, and torch's own kernels.

``int8_weight_linear``: float activations times int8 weights.
``int8_dynamic_linear``: int8 activations, one scale a token, times int8 weights, exact in int32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ao_core import Kernel, Key, Op
from ao_core.numerics import affine
from ao_quant.int_mm import int_mm


def weight_linear_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``x @ (codes * scale).T + bias`` in float32, cast to the dtype of ``x`` once.

    Args:
        x: float ``[..., K]``.
        codes: int8 ``[N, K]``.
        scale: float32 ``[N, G]``.
        bias: float ``[N]`` or None.
        group_size: columns to a scale; -1 for all.
    """
    weight = affine.dequantize(codes, scale, group_size=group_size)  # [N, K]
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def dynamic_linear_reference(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Per-token symmetric int8 activations times int8 weights; the sum in int64 is exact.

    Args and result as :func:`weight_linear_reference`, with one scale a row: ``[N, 1]``.
    """
    x_codes, x_scale = affine.quantize_per_token(x)  # int8 [..., K], float32 [..., 1]
    products = x_codes.double() @ codes.double().t()  # exact: below 2**53
    out = products.float() * x_scale * scale.view(-1)  # [..., N]
    return (out if bias is None else out + bias.float()).to(x.dtype)


def weight_linear_torch(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """Torch's int8 matrix-vector kernel for few rows, its float matmul on dequantized weights above."""
    check_input(x, codes)
    rows = x.reshape(-1, codes.shape[1])  # [M, K]
    if scale.shape[1] == 1 and _few_rows(rows):
        out = torch._weight_int8pack_mm(rows.contiguous(), codes, scale.view(-1).to(x.dtype))
        if bias is not None:
            out += bias
    elif scale.shape[1] == 1 and rows.dtype == torch.bfloat16 and rows.device.type == "cuda":
        # Exact in bfloat16, and 2.4 times faster than scaling the weight (H200, 1 row); float16 could
        # overflow.
        out = F.linear(rows, codes.to(rows.dtype)) * scale.view(-1).to(rows.dtype)
        if bias is not None:
            out += bias
    else:
        weight = codes.float()
        weight *= affine.expand_groups(scale, codes.shape[1], group_size)
        out = F.linear(rows, weight.to(x.dtype), bias)
    return out.view(*x.shape[:-1], codes.shape[0])


def dynamic_linear_torch(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Torch's int8 matmul, scales applied in float32."""
    check_input(x, codes)
    rows = x.reshape(-1, codes.shape[1])  # [M, K]
    x_codes, x_scale = affine.quantize_per_token(rows)
    out = int_mm(x_codes, codes.t()) * x_scale  # float32 [M, N]
    out *= scale.view(-1)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


# With bfloat16 torch's kernel reads whole vectors: it returns NaN or crashes unless K is a multiple of 16
# (AVX-512, torch 2.13). Other dtypes run a scalar loop.
_PACKED_COLUMNS = 32
# torch 2.13, 2 threads of a CPU with AMX, SmolLM2's shapes in bfloat16: torch's int8 kernel needs 0.19
# of the float linear's time at 1 row, 0.83 at 8, 1.4 at 16.
_PACKED_ROWS = 8


def _few_rows(rows: torch.Tensor) -> bool:
    return (
        rows.device.type == "cpu"
        and rows.dtype == torch.bfloat16
        and 0 < rows.shape[0] <= _PACKED_ROWS
        and rows.shape[1] % _PACKED_COLUMNS == 0
    )


def check_input(x: torch.Tensor, codes: torch.Tensor) -> None:
    """Raise RuntimeError, as ``F.linear`` does, unless the last dimension of ``x`` is that of ``codes``."""
    if x.shape[-1] != codes.shape[1]:
        raise RuntimeError(
            f"a linear with {codes.shape[1]} input features was given an input {tuple(x.shape)}; "
            "its last dimension must match."
        )


def _rejects(key: Key) -> str | None:
    if key.device.type not in ("cpu", "cuda"):
        return f"torch has int8 kernels for cpu and cuda, not for {key.device.type}"
    return None


def _fake(x: torch.Tensor, codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _samples(device: torch.device, grouped: bool) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    shapes = [(1, 576, 192), (3, 100, 17), (17, 63, 1), (2, 1, 5), (49, 576, 224), (4, 64, 32), (0, 64, 8)]
    for dtype in dtypes:
        for rows, k, n in shapes:
            x = torch.randn(rows, k, generator=generator).to(dtype)
            codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
            bias = torch.randn(n, generator=generator).to(dtype) if rows % 2 else None
            group_size = 64 if grouped and k > 64 else -1
            groups = -(-k // group_size) if group_size > 0 else 1
            scale = torch.rand(n, groups, generator=generator).bfloat16().float() / 100 + 1e-3
            scale = scale.bfloat16().float()
            tensors = [None if t is None else t.to(device) for t in (x, codes, scale, bias)]
            yield (*tensors, group_size)


def weight_linear_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``int8_weight_linear`` in awkward sizes: per row, and in groups of 64."""
    yield from _samples(device, grouped=False)
    yield from _samples(device, grouped=True)


def dynamic_linear_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``int8_dynamic_linear`` in awkward sizes."""
    for *tensors, _ in _samples(device, grouped=False):
        yield tuple(tensors)


def weight_linear_problem(x: torch.Tensor, n: int, seed: int) -> tuple[Any, ...]:
    """``int8_weight_linear`` of ``x`` ``[M, K]`` with random weights ``[n, K]``, one scale a row."""
    generator = torch.Generator(x.device).manual_seed(seed)
    shape = (n, x.shape[-1])
    codes = torch.randint(-128, 128, shape, generator=generator, device=x.device, dtype=torch.int8)
    scale = torch.rand(n, 1, generator=generator, device=x.device) / 100 + 1e-3
    return x, codes, scale, None, -1


def dynamic_linear_problem(x: torch.Tensor, n: int, seed: int) -> tuple[Any, ...]:
    """The same for ``int8_dynamic_linear``."""
    return weight_linear_problem(x, n, seed)[:-1]


INT8_WEIGHT_LINEAR = Op(
    "int8_weight_linear",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int group_size) -> Tensor",
    reference=weight_linear_reference,
    fake=_fake,
    samples=weight_linear_samples,
    problem=weight_linear_problem,
)
INT8_DYNAMIC_LINEAR = Op(
    "int8_dynamic_linear",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor",
    reference=dynamic_linear_reference,
    fake=_fake,
    samples=dynamic_linear_samples,
    problem=dynamic_linear_problem,
)

KERNELS = [
    Kernel("int8_weight_linear", "torch", weight_linear_torch, rejects=_rejects),
    Kernel("int8_dynamic_linear", "torch", dynamic_linear_torch, rejects=_rejects),
]
