"""The linear of the NF4 scheme and its weight in floats: 16 levels of a normal distribution, scaled by block.

A block's absmax is stored as float32, or as a byte on a grid of fourth roots that some neighbouring blocks
share. The levels are those of QLoRA (arXiv:2305.14314, appendix E).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from ao_core import Kernel, Op
from ao_core.numerics import affine, codebook, pack
from ao_quant.decoded import check_packed_input, fake, linear_by_rows, linear_float32, rejects_device

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 levels, ascending, each exact in float32; a code is an index."""


def nf4_levels(like: torch.Tensor) -> torch.Tensor:
    """``NF4_LEVELS`` as float32 ``[16]`` on the device of ``like``; not to be written to."""
    # Kept for plain tensors only: what is made while tracing belongs to the trace.
    if torch.compiler.is_compiling() or type(like) is not torch.Tensor:
        return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=like.device)
    return _kept_levels(like.device)


@functools.cache
def _kept_levels(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(mode=False):
        return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def block_absmax(
    absmax: torch.Tensor,
    offset: torch.Tensor | None,
    step: torch.Tensor | None,
    *,
    scaler_block_size: int,
) -> torch.Tensor:
    """The absmax of each block, float32 ``[..., N, G]``.

    Args:
        absmax: float32 ``[..., N, G]``; or uint8 codes, which stand for ``(offset + code * step) ** 4``.
        offset: None for float32 absmax; else float32 ``[..., N, S]``, S = ceil(G / scaler_block_size).
        step: as ``offset``.
        scaler_block_size: neighbouring blocks of a row that share an offset and a step.

    Raises:
        ValueError: offsets and steps that do not fit the blocks, or only one of both.
    """
    if offset is None or step is None:
        if offset is not step:
            raise ValueError("offset and step belong together, and only one of them was given")
        return absmax.to(torch.float32)
    blocks = absmax.shape[-1]
    root = affine.expand_groups(step, blocks, scaler_block_size) * absmax.to(torch.float32)
    root += affine.expand_groups(offset, blocks, scaler_block_size)
    square = root * root
    return square * square


def dequantize_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    offset: torch.Tensor | None,
    step: torch.Tensor | None,
    *,
    columns: int,
    block_size: int,
    scaler_block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight ``[..., N, K]``: ``level * absmax`` in float32, cast to ``dtype`` once.

    Args:
        packed: uint8 ``[..., N, ceil(K / 2)]``, two codes a byte, the even column in the low four bits.
        absmax: float32 or uint8 ``[..., N, G]``: see :func:`block_absmax`.
        offset: see there.
        step: see there.
        columns: K.
        block_size: columns to a block; the last one of a row may be shorter.
        scaler_block_size: see :func:`block_absmax`.
        dtype: of the result.

    Raises:
        ValueError: packed codes, absmax, offsets or steps that do not fit ``columns``.
    """
    values = codebook.decode(pack.unpack(packed, bits=4, columns=columns), nf4_levels(packed))
    scale = block_absmax(absmax, offset, step, scaler_block_size=scaler_block_size)
    values *= affine.expand_groups(scale, columns, block_size)
    return values.to(dtype)


def linear_reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    offset: torch.Tensor | None,
    step: torch.Tensor | None,
    bias: torch.Tensor | None,
    block_size: int,
    scaler_block_size: int,
) -> torch.Tensor:
    """``x @ weight.T + bias`` in float32, cast to the dtype of ``x`` once.

    Args:
        x: float ``[..., K]``.
        packed: uint8 ``[N, ceil(K / 2)]``.
        absmax: float32 or uint8 ``[N, G]``, G = ceil(K / block_size).
        offset: float32 ``[N, S]``, S = ceil(G / scaler_block_size), with uint8 absmax; else None.
        step: as ``offset``.
        bias: float ``[N]`` or None.
        block_size: columns to a block.
        scaler_block_size: blocks to an offset and a step.
    """
    check_packed_input(x, packed)
    weight = dequantize_nf4(
        packed,
        absmax,
        offset,
        step,
        columns=x.shape[-1],
        block_size=block_size,
        scaler_block_size=scaler_block_size,
        dtype=torch.float32,
    )
    return linear_float32(x, weight, bias)


def linear_torch(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    offset: torch.Tensor | None,
    step: torch.Tensor | None,
    bias: torch.Tensor | None,
    block_size: int,
    scaler_block_size: int,
) -> torch.Tensor:
    """Weights decoded by torch's operators, then its float matmul."""
    check_packed_input(x, packed)
    scale = block_absmax(absmax, offset, step, scaler_block_size=scaler_block_size)

    def decode(rows: slice) -> torch.Tensor:
        return dequantize_nf4(
            packed[rows],
            scale[rows],
            None,
            None,
            columns=x.shape[-1],
            block_size=block_size,
            scaler_block_size=scaler_block_size,
            dtype=x.dtype,
        )

    return linear_by_rows(x, packed.shape[0], bias, decode)


# (rows, K, N, block_size, scaler_block_size): blocks that do not divide K, K odd, one row, none, N = 1,
# K = 1, scaler blocks that do not divide the blocks.
_SIZES = [
    (1, 576, 192, 64, 256), (3, 100, 17, 32, 3), (17, 63, 1, 16, 2), (2, 1, 5, 64, 256),
    (49, 576, 224, 64, 4), (4, 64, 32, 128, 1), (0, 64, 8, 32, 256), (5, 33, 100, 1, 8),
    (40, 608, 96, 64, 9), (1, 17, 3, 256, 256),
]  # fmt: skip


def linear_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``nf4_linear`` in awkward sizes, with float32 and with 8-bit absmax."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for index, (rows, k, n, block_size, scaler_block_size) in enumerate(_SIZES):
            blocks = -(-k // block_size)
            scalers = -(-blocks // scaler_block_size)
            x = torch.randn(rows, k, generator=generator).to(dtype)
            codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
            absmax = torch.rand(n, blocks, generator=generator) + 0.01
            coded = torch.randint(0, 256, (n, blocks), generator=generator, dtype=torch.uint8)
            offset = torch.rand(n, scalers, generator=generator) / 2 + 0.1
            step = torch.rand(n, scalers, generator=generator) / 500
            bias = torch.randn(n, generator=generator).to(dtype) if rows % 2 else None
            scales = (absmax, None, None) if index % 2 else (coded, offset, step)
            parts = (x, pack.pack(codes, bits=4), *scales, bias)
            moved = (None if part is None else part.to(device) for part in parts)
            yield (*moved, block_size, scaler_block_size)


def linear_problem(x: torch.Tensor, n: int, seed: int) -> tuple[Any, ...]:
    """``nf4_linear`` of ``x`` ``[M, K]``, random weights: blocks of 64, double quantization."""
    generator, k = torch.Generator(x.device).manual_seed(seed), x.shape[-1]

    def codes(columns: int, most: int) -> torch.Tensor:
        return torch.randint(0, most, (n, columns), generator=generator, device=x.device, dtype=torch.uint8)

    blocks = -(-k // 64)
    scalers = -(-blocks // 256)
    offset = torch.rand(n, scalers, generator=generator, device=x.device) / 2 + 0.3
    step = torch.rand(n, scalers, generator=generator, device=x.device) / 500
    return x, pack.pack(codes(k, 16), bits=4), codes(blocks, 256), offset, step, None, 64, 256


def dequantize_reference(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    offset: torch.Tensor | None,
    step: torch.Tensor | None,
    columns: int,
    block_size: int,
    scaler_block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`dequantize_nf4`; a kernel's result is the same to the bit."""
    return dequantize_nf4(
        packed, absmax, offset, step, columns=columns, block_size=block_size,
        scaler_block_size=scaler_block_size, dtype=dtype,
    )  # fmt: skip


def _dequantize_fake(packed: torch.Tensor, *rest: Any) -> torch.Tensor:
    return packed.new_empty((*packed.shape[:-1], rest[3]), dtype=rest[-1])


def dequantize_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``nf4_dequantize``: the weights of the linear's samples, and a stack."""
    for x, packed, absmax, offset, step, _, *sizes in linear_samples(device):
        yield packed, absmax, offset, step, x.shape[-1], *sizes, x.dtype
    stack = torch.randint(0, 256, (3, 5, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    yield stack.to(device), torch.rand(3, 5, 3).to(device), None, None, 95, 32, 256, torch.bfloat16


NF4_DEQUANTIZE = Op(
    "nf4_dequantize",
    "(Tensor packed, Tensor absmax, Tensor? offset, Tensor? step, int columns, int block_size, "
    "int scaler_block_size, ScalarType dtype) -> Tensor",
    reference=dequantize_reference,
    fake=_dequantize_fake,
    samples=dequantize_samples,
)
NF4_LINEAR = Op(
    "nf4_linear",
    "(Tensor x, Tensor packed, Tensor absmax, Tensor? offset, Tensor? step, Tensor? bias, int block_size, "
    "int scaler_block_size) -> Tensor",
    reference=linear_reference,
    fake=fake,
    samples=linear_samples,
    problem=linear_problem,
)

KERNELS = [
    Kernel("nf4_linear", "torch", linear_torch, rejects=rejects_device),
    Kernel("nf4_dequantize", "torch", dequantize_reference, rejects=rejects_device),
]
