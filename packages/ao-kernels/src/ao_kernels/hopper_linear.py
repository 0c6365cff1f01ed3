"""Launching the kernels of weights in codes that are Hopper's alone."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16, int32, uint8
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ao_kernels.configs import Registers, Specialized
from ao_kernels.device.from_registers import from_registers
from ao_kernels.device.warp_specialized import warp_specialized
from ao_kernels.weight_linear import Codes, add_up, strides


def launch(
    x: torch.Tensor,
    weight: Codes,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Specialized | Registers,
) -> None:
    """``out = x @ weight.T + bias`` for ``x`` ``[M, K]`` and codes that the copy engine can read.

    Args:
        x: bfloat16 or float16, in rows that start at multiples of 16 bytes.
        weight: ``[N, K]``, as ``x``.
        bias: float ``[N]``, contiguous, or None.
        out: ``[M, N]``, contiguous, in the dtype of ``x``.
        config: which of the two kernels, and its tiles.
    """
    codes, *parameters = weight.pointers()
    (n, width), m = codes.shape, x.shape[0]
    tiles_k = triton.cdiv(width, 128)
    parts = triton.cdiv(tiles_k, triton.cdiv(tiles_k, config.split_k))
    target = out if parts == 1 else out.new_empty(parts, m, n, dtype=torch.float32)
    given = x if bias is None else bias
    _, *sizes = strides(weight, codes, parameters[0])
    constants = {**weight.constants(x.dtype), "BIAS": bias is not None and parts == 1}
    del constants["INTERPRET"]
    arguments = (*parameters, given, target, m, n, width, *sizes, config.group_m)
    if isinstance(config, Specialized):
        columns = 2 * config.bytes if weight.packed else config.bytes
        programs = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
        size = weight.tile_bytes(min(config.bytes, 32 if weight.packed else 64))
        warp_specialized[(programs, parts)](
            _tiles(x, config.block_m, columns), _tiles(codes, config.block_n, 128), *arguments, **constants,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BYTES=config.bytes, SLICE=size, RING=config.ring,
            CODES_RING=config.codes_ring, num_warps=8,
        )  # fmt: skip
    else:
        programs = triton.cdiv(m, config.block_m) * triton.cdiv(n, 128)
        if parts == 1:
            programs = min(programs, torch.cuda.get_device_properties(x.device).multi_processor_count)
        from_registers[(programs, parts)](
            _tiles(x, config.block_m, 64), _tiles(codes.view(torch.int32), 128, 32), *arguments, **constants,
            BLOCK_M=config.block_m, RING=config.ring, CODES_RING=config.codes_ring,
            TABLE=config.table and weight.kind == "nf4", num_warps=4,
        )  # fmt: skip
    if parts > 1:
        add_up(target, bias, given, out)


_TYPES = {torch.bfloat16: bfloat16, torch.float16: float16, torch.uint8: uint8, torch.int32: int32}


def _tiles(matrix: torch.Tensor, rows: int, columns: int) -> Any:
    """What the copy engine needs to fetch tiles of a matrix."""
    layout = NVMMASharedLayout.get_default_for([rows, columns], _TYPES[matrix.dtype])
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)
