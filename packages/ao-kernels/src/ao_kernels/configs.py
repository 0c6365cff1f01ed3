"""Which kernel computes how many rows, with which tiles: measured on an H100 (docs/kernels.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Few:
    """Tiles of :func:`ao_kernels.device.few_rows.few_rows`; ``bytes`` at most."""

    splits: int
    block_n: int
    block_m: int
    warps: int
    bytes: int
    stages: int


@dataclass(frozen=True)
class Many:
    """Tiles of :func:`ao_kernels.device.many_rows.many_rows`; ``bytes`` at most."""

    block_n: int
    block_m: int
    warps: int
    bytes: int
    stages: int
    split_k: int


@dataclass(frozen=True)
class Decoded:
    """The weight is written out in floats, ``megabytes`` at a time, and multiplied by cuBLAS."""

    megabytes: int = 256


Config = Few | Many | Decoded

_WIDE = 8192  # columns of the output from which a tile a program fills the device


def weight_config(kind: str, m: int, n: int) -> Config:
    """For ``m`` rows of activations and ``n`` columns of the output.

    Args:
        kind: ``"int4"``, ``"nf4"``, ``"int8"`` or ``"float8"``.
        m: rows.
        n: columns of the output.
    """
    return _nibble_config(kind, m, n) if kind in ("int4", "nf4") else _byte_config(m, n)


def _nibble_config(kind: str, m: int, n: int) -> Config:
    wide = n >= _WIDE
    size = 64 if kind == "int4" else 32  # groups of NF4 are short
    if m == 1:
        return Few(8, 8, 1, 2, 64, 3) if kind == "int4" else Few(8, 16, 1, 4, 32, 5)
    if m == 2:
        return Few(4, 16, 2, 2, 64, 4)
    if m <= 8:
        block_m = 4 if m <= 4 else 8
        return Few(2, 32, block_m, 2, 64, 4) if wide else Few(4, 16, block_m, 2, 64, 4)
    if m <= 16:
        if kind == "nf4":
            return Few(2, 32, 16, 2, 32, 5) if wide else Few(2, 16, 16, 2, 32, 5)
        return Few(1, 32, 16, 2, 64, 4) if wide else Few(2, 16, 16, 2, 64, 3)
    if m <= 32:
        return Few(1, 64, 32, 2, size, 3) if wide else Many(64, 32, 4, size, 3, 4)
    if m <= 64:
        return Many(128, 64, 8, size, 3, 1 if kind == "int4" else 2) if wide else Many(64, 64, 4, size, 3, 4)
    if m <= 128:
        if wide:
            return Many(128, 128, 8, 64, 3, 1) if kind == "int4" else Many(64, 128, 4, 32, 3, 1)
        return Many(64, 128, 4, size, 3, 4)
    if m <= 256 and kind == "int4":
        return Many(128, 128, 8, 64, 3, 1) if wide else Many(64, 128, 4, 64, 3, 2)
    return Decoded()


def _byte_config(m: int, n: int) -> Config:
    wide = n >= _WIDE
    if m == 1:
        return Few(8, 8, 1, 4, 128, 3) if wide else Few(8, 8, 1, 4, 64, 4)
    if m == 2:
        return Few(4, 16, 2, 4, 128, 3)
    if m <= 4:
        return Few(2, 32, 4, 2, 128, 3) if wide else Few(4, 16, 4, 2, 128, 3)
    if m <= 16:
        block_m = 8 if m <= 8 else 16
        return Few(1, 32, block_m, 2, 128, 4) if wide else Few(2, 16, block_m, 2, 128, 4)
    if m <= 128:
        block_m = 32 if m <= 32 else 64 if m <= 64 else 128
        return Many(64, block_m, 4, 128, 3, 1) if wide else Many(64, block_m, 4, 64, 3, 4)
    if m <= 256:
        return Many(128, 128, 8, 64, 3, 1) if wide else Many(64, 128, 4, 128, 3, 1)
    return Decoded()


@dataclass(frozen=True)
class Gemm:
    """Tiles of the int8 matrix products; ``loads``: through pointers or, where possible, the copy engine."""

    loads: Literal["pointers", "copy engine"]
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs_per_sm: int  # 0: one program a tile
    group_m: int


def int8_config(m: int, n: int) -> Gemm:
    """For ``m`` rows of int8 activations and ``n`` columns of the output."""
    wide = n >= _WIDE
    if m <= 32:
        block_m = 16 if m <= 16 else 32
        block_n, block_k = (64, 256) if wide else (32, 512)
        return Gemm("pointers", block_m, block_n, block_k, 4, 3, 0, 1)
    if m <= 128:
        if wide and m > 64:
            return Gemm("copy engine", 64, 128, 128, 4, 4, 0, 2)
        return Gemm("copy engine", 64, 64, 256, 4, 3 if wide else 4, 0, 1)
    if m <= 512 and not wide:
        return Gemm("copy engine", 128, 64 if m <= 256 else 128, 128, 4, 5 if m <= 256 else 4, 0, 1)
    return Gemm("copy engine", 128, 128, 128, 4, 3, 2, 8)
