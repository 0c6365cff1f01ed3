"""Which kernel computes how many rows, with which tiles: measured on H100 and H200 (docs/kernels.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Few:
    """Tiles of :func:`ao_kernels.device.few_rows.few_rows`; ``bytes`` at most.

    ``copies`` of a table of NF4 levels in shared memory, 16 or 32, or 0: looked up in registers. There is a
    table on Hopper alone, where :func:`ao_kernels.support.of_a_warp` says so.
    """

    splits: int
    block_n: int
    block_m: int
    warps: int
    bytes: int
    stages: int
    copies: int = 0


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
class Specialized:
    """Tiles of :func:`ao_kernels.device.warp_specialized.warp_specialized`.

    ``bytes`` of codes, 32 to 128, become a slot of ``ring``; ``group_m`` tiles of rows run side by side.
    """

    block_m: int
    block_n: int
    bytes: int
    ring: int
    codes_ring: int
    group_m: int
    split_k: int


@dataclass(frozen=True)
class Registers:
    """Tiles of :func:`ao_kernels.device.from_registers.from_registers`; ``group_m`` run side by side.

    ``split_k``: the most parts of K, where tiles do not fill the device. ``table``: NF4 levels are looked up
    in shared memory.
    """

    block_m: int
    ring: int
    codes_ring: int
    group_m: int
    split_k: int
    table: bool = False


@dataclass(frozen=True)
class Parts:
    """Tiles of :func:`ao_kernels.device.warp_parts.warp_parts`.

    ``parts`` of K, a warp each, of ``bytes`` of codes at most.
    """

    parts: int
    block_n: int
    block_m: int
    bytes: int
    ring: int


@dataclass(frozen=True)
class Decoded:
    """The weight is written out in floats, ``megabytes`` at a time, and multiplied by cuBLAS."""

    megabytes: int = 256


Config = Few | Many | Specialized | Registers | Parts | Decoded

# Up to so many rows: tiles for wide outputs, where a tile a program fills the device, and for narrow ones;
# these may be two: of a deep weight, and of a shallow one.
_Table = tuple[tuple[int, Config, Config | tuple[Config, Config]], ...]
_DEEP = 8192
_WIDE = 8192
_SMALL = 2048
LEAST_PARTS = 5
"""Rows: for fewer a part of K to each warp is slower than eight in a product."""
ANY = 1 << 62
"""Rows: as many as there are."""

_INT4: _Table = (
    (1, Few(8, 8, 1, 2, 64, 3), Few(8, 8, 1, 2, 64, 3)),
    (2, Few(4, 16, 2, 2, 64, 4), Few(4, 16, 2, 2, 64, 4)),
    (4, Few(2, 32, 4, 2, 64, 4), Few(4, 16, 4, 2, 64, 4)),
    (8, Few(2, 32, 8, 2, 64, 4), Few(4, 16, 8, 2, 64, 4)),
    (16, Few(1, 32, 16, 2, 64, 4), Few(2, 16, 16, 2, 64, 3)),
    (32, Few(1, 64, 32, 2, 64, 3), Many(64, 32, 4, 32, 3, 4)),
    (64, Many(128, 64, 8, 32, 3, 2), Many(64, 64, 4, 32, 3, 4)),
    (128, Many(128, 128, 8, 32, 3, 2), Many(64, 128, 4, 32, 3, 4)),
    (256, Many(64, 256, 4, 32, 3, 1), Many(64, 256, 4, 32, 3, 4)),
)
# Where groups are of 32 columns, or of any number that is no multiple of 64: for few rows, on Hopper or not.
_INT4_FINE: _Table = (
    (1, Few(8, 32, 1, 2, 16, 4), Few(16, 16, 1, 2, 16, 4)),
    (2, Few(4, 32, 2, 2, 16, 4), Few(8, 16, 2, 2, 16, 4)),
    (4, Few(4, 64, 4, 2, 16, 4), Few(8, 16, 4, 2, 16, 4)),
    (8, Few(2, 64, 8, 2, 16, 4), Few(4, 32, 8, 2, 16, 4)),
    (16, Few(2, 64, 16, 2, 16, 4), Few(4, 16, 16, 4, 16, 4)),
)
_INT4_FINE_HOPPER: _Table = (
    *_INT4_FINE[:3],
    (8, Parts(8, 64, 16, 64, 2), Parts(8, 32, 16, 64, 4)),
    (16, Parts(8, 64, 16, 64, 2), Parts(8, 32, 16, 64, 4)),
    (32, Registers(32, 8, 3, 1, 1), Parts(8, 32, 32, 64, 2)),
)
_NF4: _Table = (
    (1, Few(8, 16, 1, 4, 32, 5), Few(8, 16, 1, 4, 32, 5)),
    (2, Few(4, 16, 2, 2, 32, 4), Few(4, 16, 2, 2, 32, 4)),
    (4, Few(2, 32, 4, 2, 32, 4), Few(4, 16, 4, 2, 32, 4)),
    (8, Few(2, 32, 8, 2, 32, 4), Few(4, 16, 8, 2, 32, 4)),
    (16, Few(2, 32, 16, 2, 32, 5), Few(2, 16, 16, 2, 32, 5)),
    (32, Few(1, 64, 32, 2, 32, 3), Many(64, 32, 4, 32, 3, 4)),
    (64, Many(64, 64, 4, 32, 3, 1), Many(64, 64, 4, 32, 3, 4)),
    (128, Many(128, 128, 8, 32, 3, 2), Many(64, 128, 4, 32, 3, 4)),
)
_BYTES: _Table = (
    (1, Few(8, 8, 1, 4, 128, 3), Few(8, 8, 1, 4, 64, 4)),
    (2, Few(4, 16, 2, 4, 128, 3), Few(4, 16, 2, 4, 128, 3)),
    (4, Few(2, 32, 4, 2, 128, 3), Few(4, 16, 4, 2, 128, 3)),
    (8, Few(1, 32, 8, 2, 128, 4), Few(2, 16, 8, 2, 128, 4)),
    (16, Few(1, 32, 16, 2, 128, 4), Few(2, 16, 16, 2, 128, 4)),
    (32, Many(64, 32, 4, 128, 4, 1), Many(64, 32, 4, 128, 3, 4)),
    (64, Many(64, 64, 4, 128, 3, 1), Many(64, 64, 4, 128, 3, 4)),
    (128, Many(64, 128, 4, 128, 3, 1), Many(64, 128, 4, 128, 3, 4)),
    (512, Many(64, 256, 4, 64, 3, 1), Many(64, 256, 4, 64, 3, 2)),
)
_BYTES_FINE: _Table = ((1, Few(8, 16, 1, 4, 32, 4), Few(16, 8, 1, 2, 32, 4)),)
_BYTES_FINE_HOPPER: _Table = (
    *_BYTES_FINE,
    (8, Parts(8, 64, 16, 64, 2), Parts(8, 32, 16, 64, 3)),
    (16, Parts(8, 64, 16, 64, 3), Parts(8, 32, 16, 64, 3)),
    (32, Parts(4, 64, 32, 64, 3), Parts(8, 32, 32, 64, 3)),
)
_FINE = {
    "int4": (_INT4_FINE, _INT4_FINE_HOPPER),
    "int8": (_BYTES_FINE, _BYTES_FINE_HOPPER),
    "float8": (_BYTES_FINE, _BYTES_FINE_HOPPER),
}
_TABLES = {"int4": _INT4, "nf4": _NF4, "int8": _BYTES, "float8": _BYTES}

# On Hopper, from so many rows on, up to so many.
_HOPPER: dict[str, tuple[int, _Table]] = {
    "int4": (
        5,
        (
            (8, Few(2, 32, 8, 2, 64, 4), (Parts(8, 32, 16, 64, 3), Parts(4, 32, 16, 64, 3))),
            (16, Parts(4, 64, 16, 64, 2), (Parts(8, 32, 16, 64, 3), Parts(4, 32, 16, 64, 3))),
            (32, Parts(4, 64, 32, 64, 2), (Registers(32, 8, 3, 1, 4), Parts(4, 32, 32, 64, 3))),
            (
                64,
                Registers(64, 8, 3, 1, 1),
                (Registers(64, 8, 3, 1, 4), Specialized(64, 128, 128, 2, 2, 1, 4)),
            ),
            (
                128,
                Registers(128, 6, 3, 1, 1),
                (Registers(128, 6, 3, 1, 4), Specialized(128, 128, 64, 3, 2, 1, 4)),
            ),
            (
                256,
                Registers(256, 5, 2, 1, 1),
                (Registers(256, 5, 2, 1, 4), Specialized(256, 128, 32, 4, 2, 1, 4)),
            ),
            (512, Registers(256, 5, 2, 1, 1), (Registers(256, 5, 2, 1, 2), Registers(128, 6, 3, 4, 1))),
            (1024, Registers(256, 5, 2, 4, 2), Registers(256, 5, 2, 2, 2)),
            (1152, Decoded(), Decoded()),
            (1792, Registers(256, 5, 2, 4, 2), Decoded()),
            (2560, Registers(256, 5, 2, 4, 2), Registers(256, 5, 2, 2, 2)),
            (ANY, Decoded(), Registers(256, 5, 2, 2, 2)),
        ),
    ),
    "nf4": (
        1,
        (
            (1, Few(8, 16, 1, 4, 32, 4, copies=32), Few(8, 8, 1, 2, 32, 4, copies=32)),
            (2, Few(4, 32, 2, 2, 32, 4, copies=32), Few(4, 16, 2, 2, 32, 4, copies=32)),
            (4, Few(2, 32, 4, 2, 32, 5, copies=32), Few(4, 16, 4, 2, 32, 4)),
            (8, Few(2, 32, 8, 2, 32, 4, copies=32), Parts(8, 32, 16, 32, 2)),
            (16, Parts(8, 64, 16, 32, 2), (Parts(8, 32, 16, 32, 4), Parts(8, 32, 16, 32, 2))),
            (
                32,
                Parts(4, 64, 32, 32, 2),
                (Registers(32, 8, 3, 1, 4, table=True), Parts(8, 32, 32, 32, 2)),
            ),
            (64, Registers(64, 8, 3, 1, 1, table=True), Registers(64, 8, 3, 1, 4, table=True)),
            (128, Registers(128, 6, 3, 1, 1, table=True), Registers(128, 6, 3, 1, 4, table=True)),
            (256, Registers(256, 4, 2, 1, 1, table=True), Registers(256, 4, 2, 1, 4, table=True)),
            (
                512,
                Registers(256, 4, 2, 1, 1, table=True),
                (Registers(256, 4, 2, 1, 2, table=True), Registers(128, 6, 3, 4, 1, table=True)),
            ),
            (1024, Registers(256, 4, 2, 4, 2, table=True), Registers(256, 4, 2, 2, 2, table=True)),
            (1152, Decoded(), Decoded()),
            (1792, Registers(256, 4, 2, 4, 2, table=True), Decoded()),
            (2560, Registers(256, 4, 2, 4, 2, table=True), Registers(256, 4, 2, 2, 2, table=True)),
            (ANY, Decoded(), Registers(256, 4, 2, 2, 2, table=True)),
        ),
    ),
    "int8": (
        9,
        (
            (16, Parts(4, 64, 16, 64, 3), Parts(8, 16, 16, 64, 4)),
            (32, Parts(4, 64, 32, 64, 3), Parts(8, 32, 32, 64, 4)),
            (
                64,
                Registers(64, 8, 3, 1, 1),
                (Registers(64, 8, 3, 1, 4), Specialized(64, 128, 128, 3, 3, 1, 4)),
            ),
            (
                128,
                Registers(128, 6, 3, 1, 1),
                (Registers(128, 6, 3, 1, 4), Specialized(128, 128, 128, 3, 2, 1, 4)),
            ),
            (256, Registers(256, 5, 2, 1, 1), Specialized(256, 128, 64, 4, 2, 1, 4)),
            (
                512,
                Registers(256, 5, 2, 4, 1),
                (Registers(256, 5, 2, 1, 2), Registers(128, 6, 3, 4, 1)),
            ),
            (1024, Registers(256, 5, 2, 4, 2), Registers(256, 5, 2, 1, 1)),
            (1152, Decoded(), Decoded()),
            (1792, Registers(256, 5, 2, 4, 2), Decoded()),
            (2048, Registers(256, 5, 2, 4, 2), Registers(256, 5, 2, 4, 1)),
        ),
    ),
}
_HOPPER["float8"] = _HOPPER["int8"]


def weight_config(kind: str, m: int, n: int, k: int, hopper: bool = False, *, fine: bool = False) -> Config:
    """For ``m`` rows of activations and a weight ``[n, k]``.

    Args:
        kind: ``"int4"``, ``"nf4"``, ``"int8"`` or ``"float8"``.
        m: rows.
        n: columns of the output.
        k: columns of the input.
        hopper: whether the kernels that are Hopper's alone can run.
        fine: groups hold no multiple of 64 columns.
    """
    if hopper and (small := _small(kind, m, n)):
        return small
    table = _TABLES[kind]
    if fine and kind in _FINE and m <= _FINE[kind][hopper][-1][0]:
        table = _FINE[kind][hopper]
    elif hopper and m >= _HOPPER[kind][0]:
        table = _HOPPER[kind][1]
    for most, wide, narrow in table:
        if m <= most:
            if n >= _WIDE:
                return wide
            return narrow[k < _DEEP] if isinstance(narrow, tuple) else narrow
    return Decoded()


def few_tiles(m: int, n: int) -> int:
    """Tiles of 32 columns and of 16 or 32 rows, if they are one to a multiprocessor or less; else 0."""
    tiles = -(-m // (16 if m <= 16 else 32)) * -(-n // 32)
    return tiles if tiles <= 128 else 0


def _small(kind: str, m: int, n: int) -> Parts | None:
    """On Hopper, for small outputs."""
    tiles, block_m = few_tiles(m, n), 16 if m <= 16 else 32
    if n > _SMALL or m < LEAST_PARTS or not tiles:
        return None
    size = 32 if kind == "nf4" else 64
    if tiles <= 64:
        return Parts(8, 16, block_m, size, 3 if kind in ("int4", "nf4") else 4)
    return Parts(4 if kind == "int4" else 8, 32, block_m, size, 3)


# Of a stack on Hopper, from so many rows an expert on.
_EXPERTS_FROM = {"int4": 9, "nf4": 2, "int8": 17, "float8": 17}


def experts_config(kind: str, rows: int, experts: int) -> Registers | None:
    """On Hopper, for a stack of experts, where :class:`Registers` are the fastest.

    A tile has twice an expert's mean rows, so that one of them is enough for most experts.

    Args:
        kind: as in :func:`weight_config`.
        rows: of activations, of all experts.
        experts: how many there are.
    """
    mean = -(-rows // min(rows, experts))
    if mean < _EXPERTS_FROM[kind] and not (kind == "nf4" and rows >= max(experts, 8)):
        return None
    table = kind == "nf4"
    for most, block_m in ((8, 16), (16, 32), (32, 64), (256, 128)):
        if mean <= most:
            return Registers(block_m, 6 if block_m == 128 else 8, 3, 8, 1, table)
    return Registers(256, 4 if table else 5, 2, 2, 1, table)


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
