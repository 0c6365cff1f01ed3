"""Float activations times weights in codes: which kernel, and how it is launched."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ao_core.triton_support import interpreting
from ao_kernels import tiles
from ao_kernels.configs import Config, Decoded, Few, Gemm, Many, Parts, Registers, Specialized, weight_config
from ao_kernels.device import decode
from ao_kernels.device.assembly import NF4_LEVELS
from ao_kernels.device.dequantize import dequantize
from ao_kernels.device.few_rows import few_rows
from ao_kernels.device.many_rows import add_parts, many_rows
from ao_kernels.rows import columns_in_order, pairs_of_columns, plain_rows
from ao_kernels.support import hopper, least_columns, of_a_warp

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_KINDS = {"int4": decode.INT4, "nf4": decode.NF4, "int8": decode.INT8, "float8": decode.FLOAT8}


@dataclass(frozen=True)
class Codes:
    """A weight ``[N, K]`` as the kernels read it.

    Attributes:
        kind: ``"int4"``, ``"nf4"``, ``"int8"`` or ``"float8"``.
        codes: bytes ``[N, K]``, or ``[N, ceil(K / 2)]`` of two codes, the even column in the low four bits.
        scale: float ``[N, G]`` (``[1, 1]``: one for all), or uint8 with ``offset``.
        group_size: columns to a scale; -1 for all.
        zero: int4 alone: float midpoints or uint8 zero points ``[N, G]``, or None.
        offset: float32 ``[N, S]`` where the scale is ``(offset + code * step) ** 4``, else None.
        step: as ``offset``.
        scaler_size: groups to an offset.
    """

    kind: str
    codes: torch.Tensor
    scale: torch.Tensor
    group_size: int = -1
    zero: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    step: torch.Tensor | None = None
    scaler_size: int = 1

    @property
    def packed(self) -> bool:
        """Whether a byte holds two codes."""
        return self.kind in ("int4", "nf4")

    @property
    def group_bytes(self) -> int:
        """Bytes to a scale; 0: one for the row."""
        if self.scale.shape[1] == 1:
            return 0
        return self.group_size // 2 if self.packed else self.group_size

    @property
    def fine(self) -> bool:
        """Whether groups hold no multiple of 64 columns: tiles of few rows are narrow then."""
        return self.group_bytes % (32 if self.packed else 64) != 0

    def tile_bytes(self, most: int) -> int:
        """Bytes of a row to a tile: a power of two up to ``most`` that divides a group."""
        return math.gcd(self.group_bytes, most) if self.group_bytes else most

    def pointers(self) -> tuple[torch.Tensor, ...]:
        """Codes, scale, zero, offset, step, contiguous along rows; what is absent is the scale again."""
        codes = self.codes if self.codes.stride(1) == 1 else self.codes.contiguous()
        scale = self.scale.contiguous()
        rest = (scale if each is None else each.contiguous() for each in (self.zero, self.offset, self.step))
        return (codes.view(torch.uint8), scale, *rest)

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """What each kernel is compiled for, and how."""
        zero = 0
        if self.zero is not None:
            zero = 1 if self.zero.is_floating_point() else 2
        coded = 0
        if self.offset is not None:
            coded = 1 if self.offset.shape[1] == 1 else 2
        return {
            "KIND": _KINDS[self.kind],
            "ZERO": zero,
            "CODED": coded,
            "DTYPE": _TYPES[dtype],
            "GROUP": self.group_bytes,
            "INTERPRET": interpreting(),
            "enable_fp_fusion": True,
        }


def check_columns(x: torch.Tensor, *columns: int) -> None:
    """Raise RuntimeError, as ``F.linear`` does, unless the last dimension of ``x`` is one of ``columns``."""
    if x.shape[-1] not in columns:
        features = " or ".join(str(each) for each in columns)
        raise RuntimeError(
            f"a linear with {features} input features was given an input {tuple(x.shape)}; its last "
            "dimension must match."
        )


def weight_linear(
    x: torch.Tensor, weight: Codes, bias: torch.Tensor | None, config: Config | None = None
) -> torch.Tensor:
    """``x @ weight.T + bias`` for ``x`` ``[..., K]`` in bfloat16 or float16, summed in float32.

    Args:
        x: float ``[..., K]``.
        weight: ``[N, K]``.
        bias: float ``[N]`` or None.
        config: the kernel and its tiles; by default those that were measured, or the table's.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    (n, width), k = weight.codes.shape, x.shape[-1]
    check_columns(x, *((2 * width - 1, 2 * width) if weight.packed else (width,)))
    rows = x.reshape(-1, k)
    out = x.new_empty(rows.shape[0], n)
    if rows.shape[0]:
        config = _runnable(config or _config(weight, rows), weight, rows)
        added = None if bias is None else bias.contiguous()
        with on_device(x.device):
            if isinstance(config, Few):
                _few(rows, weight, added, out, config)
            elif isinstance(config, Many):
                _many(rows, weight, added, out, config)
            elif isinstance(config, (Specialized, Registers, Parts)):
                from ao_kernels.hopper_linear import launch  # Gluon is imported where it is needed

                launch(rows, weight, added, out, config)
            else:
                _decoded(rows, weight, added, out, config)
    return out.view(*x.shape[:-1], n)


def _config(weight: Codes, rows: torch.Tensor) -> Config:
    """Tiles that were measured for this call, with groups of another size if they were; else the table's."""
    n, kind = weight.codes.shape[0], weight.kind
    found = tiles.find(kind, rows.shape[0], n, rows.shape[1], rows.dtype, rows.device)
    if found is None or isinstance(found, Gemm) or weight.fine:
        return weight_config(kind, rows.shape[0], n, rows.shape[1], hopper(rows.device), fine=weight.fine)
    return found


_MOST_PROGRAMS = 65535  # on an axis of the grid but the first
_LEAST_BYTES = 16  # of a part of K: a word to each of four lanes
_MOST_SCALES = 2**31  # that 32 bits count


def _runnable(config: Config, weight: Codes, rows: torch.Tensor) -> Config:
    """``config``, or another where scales or operands can't be read so, or a grid can't hold the tiles."""
    if isinstance(config, Parts):
        few = triton.cdiv(rows.shape[0], config.block_m) <= _MOST_PROGRAMS
        if not few or weight.tile_bytes(config.bytes) < _LEAST_BYTES:
            config = Registers(config.block_m, 8, 3, 1, 4, weight.kind == "nf4")
    if isinstance(config, (Specialized, Registers, Parts)):
        if readable(rows, weight, words=not isinstance(config, Specialized)) and hopper(rows.device):
            return config
        n, k = weight.codes.shape[0], rows.shape[1]
        config = weight_config(weight.kind, rows.shape[0], n, k, fine=weight.fine)
    if isinstance(config, (Few, Many)) and triton.cdiv(rows.shape[0], config.block_m) > _MOST_PROGRAMS:
        return Decoded()
    return config


def readable(x: torch.Tensor, weight: Codes, *, words: bool) -> bool:
    """Whether the kernels that are Hopper's alone can read ``x`` and a weight; one reads words of codes."""
    fits = _copyable(x) and _copyable(weight.codes) and weight.scale.numel() < _MOST_SCALES
    if words:  # scales lie between them
        word = 4 if weight.packed else 8
        fits = fits and weight.codes.shape[1] % 4 == 0 and weight.group_bytes % word == 0
    return fits


def _copyable(matrix: torch.Tensor) -> bool:
    """Whether the copy engine reads it: rows that start at multiples of 16 bytes."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
    return aligned and matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def on_device(device: torch.device) -> Any:
    """Triton launches on the current device, whatever the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _levels() -> torch.Tensor:
    with torch.inference_mode(mode=False):
        return torch.tensor(NF4_LEVELS)


def nf4_table(unused: torch.Tensor) -> torch.Tensor:
    """The levels, for the interpreter; compiled kernels hold them, and nothing is allocated for them."""
    return _levels() if interpreting() else unused


def strides(weight: Codes, codes: torch.Tensor, scale: torch.Tensor) -> tuple[int, ...]:
    """Distance of rows of codes; groups; scalers; groups to a scaler. One scale for all: no distance."""
    scalers = 1 if weight.offset is None else weight.offset.shape[1]
    groups = scale.shape[1] if scale.shape[0] == codes.shape[0] else 0
    return codes.stride(0), groups, scalers, weight.scaler_size


def _few(x: torch.Tensor, weight: Codes, bias: torch.Tensor | None, out: torch.Tensor, config: Few) -> None:
    codes, *parameters = weight.pointers()
    (n, width), m = codes.shape, x.shape[0]
    words = pairs_of_columns(x) if weight.packed else plain_rows(x)
    size, block_m = weight.tile_bytes(config.bytes), rows_of(config)
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, block_m))
    few_rows[grid](
        words, codes, *parameters, x if bias is None else bias, out, nf4_table(out),
        m, n, width, words.stride(0), *strides(weight, codes, parameters[0]),
        **weight.constants(x.dtype), BIAS=bias is not None, SPLITS=config.splits, BLOCK_N=config.block_n,
        BLOCK_M=block_m, BYTES=size, STAGES=config.stages,
        WHOLE=width % (size * config.splits) == 0 and n % config.block_n == 0,
        COPIES=_copies(config, weight, x.device), num_warps=config.warps,
    )  # fmt: skip


def rows_of(config: Few) -> int:
    """Of a tile: more than ``config`` says where Triton takes no product as narrow."""
    return max(config.block_m, least_columns() // config.splits)


def _copies(config: Few, weight: Codes, device: torch.device) -> int:
    """Of the table of NF4 levels, 0 where there can be none."""
    fits = weight.kind == "nf4" and of_a_warp(config.warps, config.splits * config.block_m)
    return config.copies if fits and hopper(device) else 0


def _many(x: torch.Tensor, weight: Codes, bias: torch.Tensor | None, out: torch.Tensor, config: Many) -> None:
    codes, *parameters = weight.pointers()
    (n, width), m = codes.shape, x.shape[0]
    size = weight.tile_bytes(config.bytes)
    constants = weight.constants(x.dtype)
    x = columns_in_order(x, width, size, constants["DTYPE"]) if weight.packed else plain_rows(x)
    parts = config.split_k if width >= 2 * size * config.split_k else 1
    target = out if parts == 1 else out.new_empty(parts, m, n, dtype=torch.float32)
    given = x if bias is None else bias
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), parts)
    many_rows[grid](
        x, codes, *parameters, given, target, nf4_table(target),
        m, n, width, x.stride(0), *strides(weight, codes, parameters[0]),
        **constants, BIAS=bias is not None and parts == 1, BLOCK_N=config.block_n,
        BLOCK_M=config.block_m, BYTES=size, STAGES=config.stages, SPLIT_K=parts,
        WHOLE=width % size == 0 and n % config.block_n == 0, num_warps=config.warps,
    )  # fmt: skip
    if parts > 1:
        add_up(target, bias, given, out)


def add_up(parts: torch.Tensor, bias: torch.Tensor | None, given: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` ``[M, N]``: the sum of float32 ``parts`` ``[P, M, N]``, and the bias, then in ``given``."""
    block = 1024
    add_parts[(triton.cdiv(out.numel(), block),)](
        parts, given, out, out.numel(), out.shape[1], PARTS=parts.shape[0], BIAS=bias is not None,
        BLOCK=block, enable_fp_fusion=True,
    )  # fmt: skip


def _decoded(
    x: torch.Tensor, weight: Codes, bias: torch.Tensor | None, out: torch.Tensor, config: Decoded
) -> None:
    n, k = weight.codes.shape[0], x.shape[1]
    at_once = max((config.megabytes << 20) // (k * x.element_size()), 1)
    for start in range(0, n, at_once):
        part = slice(start, min(start + at_once, n))
        floats = dequantized(weight, k, x.dtype, part)
        if bias is None:
            torch.mm(x, floats.t(), out=out[:, part])
        else:
            torch.addmm(bias[part].to(x.dtype), x, floats.t(), out=out[:, part])


def dequantized(
    weight: Codes, columns: int, dtype: torch.dtype, rows: slice, *, exact: bool = False
) -> torch.Tensor:
    """Rows ``rows`` of the weight, ``[R, columns]`` in ``dtype``: bfloat16 or float16.

    Args:
        weight: ``[N, columns]``.
        columns: K.
        dtype: of the result.
        rows: some of N.
        exact: NF4 alone, and float32 too: levels in float32 and each operation rounded, as in the reference.
    """
    codes, *parameters = weight.pointers()
    codes = codes[rows]
    own = [each[rows] if each.shape[0] > 1 else each for each in parameters]
    (n, width), (stride, groups, *rest) = codes.shape, strides(weight, codes, own[0])
    out = own[0].new_empty(n, columns, dtype=dtype)
    size, block = weight.tile_bytes(64 if weight.packed else 128), 32
    dequantize[(triton.cdiv(n, block) * triton.cdiv(width, size),)](
        codes, *own, out, nf4_table(out), columns, width, stride, groups, *rest,
        **weight.constants(torch.float32 if exact else dtype) | {"enable_fp_fusion": not exact},
        ROWS=block, BYTES=size, N=n,
    )  # fmt: skip
    return out
