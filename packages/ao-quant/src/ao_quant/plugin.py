"""What ao-quant registers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ao_core import hookimpl

if TYPE_CHECKING:
    import torch


@hookimpl
def ao_register_schemes() -> list[Any]:
    """Every scheme of this package."""
    from ao_quant.float8 import Float8Dynamic, Float8WeightOnly
    from ao_quant.int4 import Int4WeightOnly, Int8DynamicInt4Weight
    from ao_quant.int8 import Int8Dynamic, Int8WeightOnly
    from ao_quant.nf4 import Nf4
    from ao_quant.uint4 import UInt4

    integers = [Int8WeightOnly, Int8Dynamic, Int4WeightOnly, Int8DynamicInt4Weight, UInt4]
    return [*integers, Nf4, Float8WeightOnly, Float8Dynamic]


@hookimpl
def ao_register_ops() -> list[Any]:
    """The linears of the schemes."""
    from ao_quant import experts_ops, float8_ops, int4_ops, int4_tiles, int8_mm_ops, int8_ops, nf4_ops

    return [
        int8_mm_ops.INT8_MM,
        int8_mm_ops.INT8_SCALED_MM,
        int8_ops.INT8_WEIGHT_LINEAR,
        int8_ops.INT8_DYNAMIC_LINEAR,
        int4_ops.INT4_WEIGHT_LINEAR,
        int4_ops.INT8_DYNAMIC_INT4_LINEAR,
        int4_tiles.INT4_TILED_LINEAR,
        nf4_ops.NF4_LINEAR,
        nf4_ops.NF4_DEQUANTIZE,
        float8_ops.FLOAT8_WEIGHT_LINEAR,
        float8_ops.FLOAT8_DYNAMIC_LINEAR,
        *experts_ops.OPS,
    ]


@hookimpl
def ao_register_kernels() -> list[Any]:
    """Kernels in C for the CPU, and torch's own."""
    from ao_quant import (
        experts_ops,
        float8_native,
        float8_ops,
        int4_ops,
        int4_tiles,
        int8_mm_ops,
        int8_native,
        int8_ops,
        nf4_ops,
        nibble_native,
    )

    natives = (int8_native, nibble_native, float8_native)
    modules = (*natives, int8_mm_ops, int8_ops, int4_ops, int4_tiles, nf4_ops, float8_ops, experts_ops)
    return [kernel for module in modules for kernel in module.KERNELS]


@hookimpl
def ao_register_algorithms() -> list[Any]:
    """SmoothQuant."""
    from ao_quant.smoothquant import SmoothQuant

    return [SmoothQuant]


@hookimpl
def ao_propose_schemes(fqn: str, weight: torch.Tensor, sample: torch.Tensor | None) -> list[Any]:
    """Group sizes of the 4-bit schemes beside their defaults, and an int8 that keeps groups apart.

    A few bits more or less leave room for plans: what coarse blocks of ``nf4`` save pays for eight bits where
    they count.
    """
    from ao_quant.int4 import Int4WeightOnly, Int8DynamicInt4Weight
    from ao_quant.int8 import Int8WeightOnly
    from ao_quant.nf4 import Nf4

    finer = [Int4WeightOnly(group_size=32), Int4WeightOnly(group_size=64)]
    coarser = [Nf4(block_size=128), Nf4(block_size=256), Int8DynamicInt4Weight(group_size=128)]
    return [*finer, *coarser, Int8WeightOnly(group_size=32)]
