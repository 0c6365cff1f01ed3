"""What ao-quant registers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ao_core import hookimpl

if TYPE_CHECKING:
    import torch


@hookimpl
def ao_register_schemes() -> list[Any]:
    """The int8 schemes."""
    from ao_quant.int8 import Int8Dynamic, Int8WeightOnly

    return [Int8WeightOnly, Int8Dynamic]


@hookimpl
def ao_register_ops() -> list[Any]:
    """The linears of the schemes."""
    from ao_quant.int8_ops import INT8_DYNAMIC_LINEAR, INT8_WEIGHT_LINEAR

    return [INT8_WEIGHT_LINEAR, INT8_DYNAMIC_LINEAR]


@hookimpl
def ao_register_kernels() -> list[Any]:
    """Kernels in C for the CPU, and torch's own."""
    from ao_quant import int8_ops, native

    return [*native.KERNELS, *int8_ops.KERNELS]


@hookimpl
def ao_propose_schemes(fqn: str, weight: torch.Tensor, sample: torch.Tensor | None) -> list[Any]:
    """Both int8 schemes, for any weight."""
    from ao_quant.int8 import Int8Dynamic, Int8WeightOnly

    return [Int8WeightOnly(), Int8Dynamic()]
