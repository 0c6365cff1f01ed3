"""The linears of the 4-bit integer schemes: references, and what torch computes.

``int4_weight_linear``: float activations times 4-bit weights in groups.
``int8_dynamic_int4_linear``: asymmetric int8 activations, one scale and zero point a token, times
symmetric 4-bit weights in groups.

Codes are packed two to a byte, the even column in the low four bits (:mod:`ao_core.numerics.pack`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ao_core import Kernel, Op
from ao_core.numerics import affine, pack
from ao_quant import ranges
from ao_quant.decoded import check_packed_input, fake, linear_by_rows, linear_float32, rejects_device


def dequantize_int4(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight ``[..., N, K]`` of packed 4-bit codes, computed in float32 and cast to ``dtype`` once.

    Args:
        packed: uint8 ``[..., N, ceil(K / 2)]``.
        scale: float ``[..., N, G]``.
        zero: None for ``(q - 8) * scale``; float ``[..., N, G]`` for ``(q - 8) * scale + zero``;
            uint8 ``[..., N, G]`` for ``(q - zero) * scale``.
        columns: K.
        group_size: columns to a scale, the last group may be shorter; -1 for all.
        dtype: of the result.

    Raises:
        ValueError: packed codes or scales that do not fit ``columns``.
    """
    codes = pack.unpack(packed, bits=4, columns=columns)
    return ranges.decode(codes, *ranges.by_column(scale, zero, columns, group_size)).to(dtype)


def quantize_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Asymmetric int8 activations, one scale and zero point a row.

    Args:
        x: float ``[..., K]``.

    Returns:
        ``(steps, scale)``, float32 ``[..., K]`` and ``[..., 1]``: ``x ≈ steps * scale``. Steps are codes
        in [-128, 127] less the zero point: whole numbers in [-255, 255].
    """
    scale, zero_point = affine.choose_affine(x, qmin=-128, qmax=127)
    codes = affine.quantize(x, scale, zero_point=zero_point, qmin=-128, qmax=127)
    return codes.to(torch.float32) - zero_point, scale


def weight_linear_reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``x @ weight.T + bias`` in float32, cast to the dtype of ``x`` once.

    Args:
        x: float ``[..., K]``.
        packed: uint8 ``[N, ceil(K / 2)]``.
        scale: bfloat16 or float32 ``[N, G]``.
        zero: None, bfloat16, float32 or uint8 ``[N, G]``: see :func:`dequantize_int4`.
        bias: float ``[N]`` or None.
        group_size: columns to a scale; -1 for all.
    """
    check_packed_input(x, packed)
    weight = dequantize_int4(
        packed, scale, zero, columns=x.shape[-1], group_size=group_size, dtype=torch.float32
    )
    return linear_float32(x, weight, bias)


def dynamic_linear_reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """Per-token int8 activations times ``(q - 8) * scale``: exact integer sums, one for each group.

    Args and result as :func:`weight_linear_reference`.
    """
    check_packed_input(x, packed)
    k = x.shape[-1]
    steps, x_scale = quantize_token(x)
    codes = pack.unpack(packed, bits=4, columns=k).double() - ranges.MIDDLE  # [N, K]
    size = k if group_size < 0 else group_size
    out = x_scale.new_zeros(*x.shape[:-1], packed.shape[0])
    for group, start in enumerate(range(0, k, size)):
        columns = slice(start, start + size)
        sums = steps[..., columns].double() @ codes[:, columns].t()  # exact: below 2**53
        out += sums.float() * scale[:, group].float()
    out *= x_scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def weight_linear_torch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """Weights decoded by torch's operators, then its float matmul."""
    check_packed_input(x, packed)

    def decode(rows: slice) -> torch.Tensor:
        return dequantize_int4(
            packed[rows],
            scale[rows],
            None if zero is None else zero[rows],
            columns=x.shape[-1],
            group_size=group_size,
            dtype=x.dtype,
        )

    return linear_by_rows(x, packed.shape[0], bias, decode)


def dynamic_linear_torch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """The activations' codes, exact in any float dtype, times decoded weights; their scales at the end."""
    steps, x_scale = quantize_token(x)
    # By 256, so that float16 sums do not overflow.
    narrow = (steps / 256).to(x.dtype)
    out = weight_linear_torch(narrow, packed, scale, None, None, group_size).float()
    out *= x_scale * 256
    return (out if bias is None else out.add_(bias)).to(x.dtype)


# (rows, K, N, group_size): groups that do not divide K, K odd, one row, none, N = 1, K = 1.
_SIZES = [
    (1, 576, 192, 64), (3, 100, 17, 32), (17, 63, 1, 16), (2, 1, 5, -1), (49, 576, 224, 128),
    (4, 64, 32, -1), (0, 64, 8, 32), (5, 33, 100, 1), (40, 608, 96, 32), (1, 17, 3, 256),
]  # fmt: skip


def _parts(device: torch.device) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for index, (rows, k, n, group_size) in enumerate(_SIZES):
            groups = -(-k // group_size) if group_size > 0 else 1
            x = torch.randn(rows, k, generator=generator).to(dtype)
            codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
            scale = (torch.rand(n, groups, generator=generator) / 10 + 0.01).bfloat16()
            bias = torch.randn(n, generator=generator).to(dtype) if rows % 2 else None
            floating = torch.randn(n, groups, generator=generator) / 10
            whole = torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8)
            zeros = (None, floating.bfloat16(), whole, floating)
            if index % 2:
                scale = scale.float()
            parts = (x, pack.pack(codes, bits=4), scale, zeros[index % 4], bias)
            yield (*(None if part is None else part.to(device) for part in parts), group_size)


def weight_linear_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``int4_weight_linear`` in awkward sizes, with each kind of zero point."""
    yield from _parts(device)


def dynamic_linear_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``int8_dynamic_int4_linear`` in awkward sizes."""
    for x, packed, scale, _, bias, group_size in _parts(device):
        yield x, packed, scale, bias, group_size


def _random(x: torch.Tensor, n: int, seed: int, group_size: int) -> tuple[torch.Tensor, ...]:
    """Packed codes ``[n, ceil(K / 2)]``, scales and midpoints ``[n, G]``."""
    generator, k = torch.Generator(x.device).manual_seed(seed), x.shape[-1]
    codes = torch.randint(0, 16, (n, k), generator=generator, device=x.device, dtype=torch.uint8)
    groups = -(-k // group_size)
    scale = (torch.rand(n, groups, generator=generator, device=x.device) / 10 + 0.01).bfloat16()
    zero = (torch.randn(n, groups, generator=generator, device=x.device) / 10).bfloat16()
    return pack.pack(codes, bits=4), scale, zero


def weight_linear_problem(x: torch.Tensor, n: int, seed: int) -> tuple[Any, ...]:
    """``int4_weight_linear`` of ``x`` ``[M, K]``, random weights in groups of 128, midpoints."""
    return (x, *_random(x, n, seed, 128), None, 128)


def dynamic_linear_problem(x: torch.Tensor, n: int, seed: int) -> tuple[Any, ...]:
    """``int8_dynamic_int4_linear`` of ``x`` ``[M, K]``, random weights ``[n, K]`` in groups of 32."""
    packed, scale, _ = _random(x, n, seed, 32)
    return x, packed, scale, None, 32


INT4_WEIGHT_LINEAR = Op(
    "int4_weight_linear",
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int group_size) -> Tensor",
    reference=weight_linear_reference,
    fake=fake,
    samples=weight_linear_samples,
    problem=weight_linear_problem,
)
INT8_DYNAMIC_INT4_LINEAR = Op(
    "int8_dynamic_int4_linear",
    "(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int group_size) -> Tensor",
    reference=dynamic_linear_reference,
    fake=fake,
    samples=dynamic_linear_samples,
    problem=dynamic_linear_problem,
)

KERNELS = [
    Kernel("int4_weight_linear", "torch", weight_linear_torch, rejects=rejects_device),
    Kernel("int8_dynamic_int4_linear", "torch", dynamic_linear_torch, rejects=rejects_device),
]
