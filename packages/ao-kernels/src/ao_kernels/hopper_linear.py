"""Launching the kernels of weights in codes that are Hopper's alone."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16, int32, uint8
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ao_kernels.configs import Parts, Registers, Specialized
from ao_kernels.device.from_registers import from_registers
from ao_kernels.device.pieces import add_tiles
from ao_kernels.device.warp_parts import SCALES, warp_parts
from ao_kernels.device.warp_specialized import warp_specialized
from ao_kernels.weight_linear import Codes, add_up, strides


def launch(
    x: torch.Tensor,
    weight: Codes,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Specialized | Registers | Parts,
) -> None:
    """``out = x @ weight.T + bias`` for ``x`` ``[M, K]`` and codes that the copy engine can read.

    Args:
        x: bfloat16 or float16, in rows that start at multiples of 16 bytes.
        weight: ``[N, K]``, as ``x``.
        bias: float ``[N]``, contiguous, or None.
        out: ``[M, N]``, contiguous, in the dtype of ``x``.
        config: which of the kernels, and its tiles.
    """
    if isinstance(config, Registers):
        _from_registers(x, weight, bias, None, out, config)
    elif isinstance(config, Parts):
        _warp_parts(x, weight, bias, out, config)
    else:
        _warp_specialized(x, weight, bias, out, config)


def launch_experts(
    x: torch.Tensor, weight: Codes, offsets: torch.Tensor, out: torch.Tensor, config: Registers
) -> None:
    """The same for ``x`` ``[S, K]`` sorted by expert, and a stack ``[E * N, K]``.

    Args:
        x: as in :func:`launch`.
        weight: as in :func:`launch`.
        offsets: int32 or int64 ``[E]``, contiguous: where the rows of each expert end; those after the last
            become zeros.
        out: ``[S, N]``.
        config: the kernel's tiles.
    """
    _from_registers(x, weight, None, offsets, out, config)


def _warp_specialized(
    x: torch.Tensor, weight: Codes, bias: torch.Tensor | None, out: torch.Tensor, config: Specialized
) -> None:
    codes, *parameters = weight.pointers()
    (n, width), m = codes.shape, x.shape[0]
    tiles_k = triton.cdiv(width, 128)
    parts = triton.cdiv(tiles_k, triton.cdiv(tiles_k, config.split_k))
    target = out if parts == 1 else out.new_empty(parts, m, n, dtype=torch.float32)
    given = x if bias is None else bias
    _, *sizes = strides(weight, codes, parameters[0])
    columns = 2 * config.bytes if weight.packed else config.bytes
    programs = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    warp_specialized[(programs, parts)](
        _tiles(x, config.block_m, columns), _tiles(codes, config.block_n, 128), *parameters, given, target,
        m, n, width, *sizes, config.group_m, **_constants(weight, x), BIAS=bias is not None and parts == 1,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BYTES=config.bytes,
        SLICE=weight.tile_bytes(min(config.bytes, 32 if weight.packed else 64)), RING=config.ring,
        CODES_RING=config.codes_ring, num_warps=8,
    )  # fmt: skip
    if parts > 1:
        add_up(target, bias, given, out)


def _warp_parts(
    x: torch.Tensor, weight: Codes, bias: torch.Tensor | None, out: torch.Tensor, config: Parts
) -> None:
    codes, *parameters = weight.pointers()
    (m, n), width = out.shape, codes.shape[1]
    size = weight.tile_bytes(config.bytes)
    slot = config.parts * size
    ring = config.ring
    if weight.kind == "nf4":  # Triton knows nothing of their table, and only asks for more if its own is more
        own = 4 * SCALES.value * config.block_n if weight.group_bytes else 0
        ring = max(ring, triton.cdiv(_UNASKED - own, slot * (config.block_n + 4 * config.block_m)))
    _, *sizes = strides(weight, codes, parameters[0])
    warp_parts[(triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m))](
        _tiles(x, config.block_m, 2 * slot if weight.packed else slot),
        _tiles(codes.view(torch.int32), config.block_n, slot // 4), *parameters, x if bias is None else bias,
        out, m, n, width, *sizes, **_constants(weight, x), BIAS=bias is not None, PARTS=config.parts,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, BYTES=size, RING=ring,
        LONG=triton.cdiv(width, slot) * config.parts > SCALES.value, num_warps=config.parts,
    )  # fmt: skip


_UNASKED = (48 << 10) + 1  # bytes of shared memory
_BLOCK_N = 128  # columns of a tile
_ROWS = 8  # of a tile that a program adds up
_EXPERTS = 128  # at least: as many as threads look them up


def _from_registers(
    x: torch.Tensor,
    weight: Codes,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
    out: torch.Tensor,
    config: Registers,
) -> None:
    codes, *parameters = weight.pointers()
    (m, n), width = out.shape, codes.shape[1]
    experts = 0 if offsets is None else offsets.shape[0]
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, _BLOCK_N)
    device = torch.cuda.get_device_properties(x.device).multi_processor_count
    cut, whole = (1, tiles) if experts else _cut(tiles, triton.cdiv(width, 128), device, config.split_k)
    sums = out
    if cut > 1:
        sums = out.new_empty(tiles - whole, cut, config.block_m, _BLOCK_N, dtype=torch.float32)
    given = x if bias is None else bias
    _, *sizes = strides(weight, codes, parameters[0])
    programs = device if experts else min(whole + (tiles - whole) * cut, device)
    from_registers[(programs,)](
        _tiles(x, config.block_m, 64), _tiles(codes.view(torch.int32), _BLOCK_N, 32), *parameters, given,
        x if offsets is None else offsets, out, sums, m, n, experts, width, *sizes, config.group_m, whole,
        **_constants(weight, x), BIAS=bias is not None, BLOCK_M=config.block_m, RING=config.ring,
        CODES_RING=config.codes_ring, CUT=cut,
        EXPERTS=max(triton.next_power_of_2(experts), _EXPERTS) if experts else 0,
        TABLE=config.table and weight.kind == "nf4", num_warps=4,
    )  # fmt: skip
    if cut > 1:
        add_tiles[((tiles - whole) * (config.block_m // _ROWS),)](
            sums, given, out, m, n, config.group_m, whole, CUT=cut, BIAS=bias is not None,
            BLOCK_M=config.block_m, BLOCK_N=_BLOCK_N, ROWS=_ROWS, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip


def _cut(tiles: int, tiles_k: int, device: int, most: int) -> tuple[int, int]:
    """In how many parts of K the tiles of the last round are cut, and how many tiles there are before them.

    As many as the device has room for, ``most`` at most, each of one tile of K or more.
    """
    rest = tiles % device
    parts = min(most, device // rest) if rest else 1
    parts = triton.cdiv(tiles_k, triton.cdiv(tiles_k, parts))
    return (parts, tiles - rest) if parts > 1 else (1, tiles)


def _constants(weight: Codes, x: torch.Tensor) -> dict[str, Any]:
    constants = weight.constants(x.dtype)
    del constants["INTERPRET"]
    return constants


_TYPES = {torch.bfloat16: bfloat16, torch.float16: float16, torch.uint8: uint8, torch.int32: int32}


def _tiles(matrix: torch.Tensor, rows: int, columns: int) -> Any:
    """What the copy engine needs to fetch tiles of a matrix."""
    layout = NVMMASharedLayout.get_default_for([rows, columns], _TYPES[matrix.dtype])
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)
