"""Codes of 1, 2 or 4 bits in bytes, along the last dim, the first code in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """``[..., K] -> [..., ceil(K * bits / 8)]``; a last byte that is not full is filled with zeros.

    Args:
        codes: integers or bools in ``[0, 2 ** bits)``. Shift signed codes first.
        bits: 1, 2 or 4.

    Returns:
        uint8.

    Raises:
        TypeError: float codes.
        ValueError: other ``bits``, or a code out of range (not looked at when compiling).
    """
    per_byte = _codes_per_byte(bits)
    _check_codes(codes, bits)
    columns = codes.shape[-1]
    full = -(-columns // per_byte)
    padded = F.pad(codes.to(torch.uint8), (0, full * per_byte - columns))
    lanes = padded.reshape(*codes.shape[:-1], full, per_byte)  # [..., B, p]
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack(packed: Tensor, *, bits: int, columns: int) -> Tensor:
    """The inverse of ``pack``: ``[..., ceil(columns * bits / 8)] -> [..., columns]``.

    Args:
        packed: uint8.
        bits: as packed.
        columns: K, which the bytes alone do not tell.

    Returns:
        uint8 codes in ``[0, 2 ** bits)``.

    Raises:
        TypeError: ``packed`` is not uint8.
        ValueError: other ``bits``, or a byte count that does not belong to ``columns``.
    """
    per_byte = _codes_per_byte(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes are uint8; got {packed.dtype}")
    if packed.shape[-1] != -(-columns // per_byte):
        raise ValueError(
            f"{columns} codes of {bits} bits take {-(-columns // per_byte)} bytes, but the last "
            f"dim has {packed.shape[-1]}; pass the columns and bits that were packed"
        )
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    lanes: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)  # [..., B, p]
    return lanes.flatten(-2)[..., :columns].contiguous()


def _codes_per_byte(bits: int) -> int:
    if bits == 8:
        raise ValueError("8-bit codes fill whole bytes; store them as they are")
    if bits not in (1, 2, 4):
        raise ValueError(f"{bits}-bit codes do not divide a byte; pack 1, 2 or 4 bits, or round up")
    return 8 // bits


def _check_codes(codes: Tensor, bits: int) -> None:
    if codes.is_floating_point() or codes.is_complex():
        raise TypeError(f"expected integer codes to pack; got {codes.dtype}")
    # Reading the range would break a compiled graph.
    if torch.compiler.is_compiling() or codes.numel() == 0 or codes.dtype == torch.bool:
        return
    low, high = (int(bound) for bound in codes.aminmax())
    if low < 0 or high >= 2**bits:
        raise ValueError(
            f"codes in [{low}, {high}] do not fit {bits} bits, [0, {2**bits - 1}]; shift or clamp them"
        )
