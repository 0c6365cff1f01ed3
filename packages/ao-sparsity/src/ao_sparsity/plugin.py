"""What ao-sparsity registers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ao_core import hookimpl

if TYPE_CHECKING:
    import torch


@hookimpl
def ao_register_schemes() -> list[Any]:
    """2:4 weights in float, and in int8."""
    from ao_sparsity.semi_structured import SemiSparse, SemiSparseInt8Dynamic

    return [SemiSparse, SemiSparseInt8Dynamic]


@hookimpl
def ao_register_ops() -> list[Any]:
    """Their linears."""
    from ao_sparsity import linear, sparse_cores

    return [
        linear.SEMI_SPARSE_LINEAR,
        linear.SEMI_SPARSE_INT8_LINEAR,
        sparse_cores.SEMI_SPARSE_PACKED_LINEAR,
    ]


@hookimpl
def ao_register_kernels() -> list[Any]:
    """Torch's own."""
    from ao_sparsity import linear, sparse_cores

    return [*linear.KERNELS, *sparse_cores.KERNELS]


@hookimpl
def ao_register_algorithms() -> list[Any]:
    """Magnitude pruning, Wanda, SparseGPT."""
    from ao_sparsity.algorithm import Magnitude, SparseGpt, Wanda

    return [Magnitude, Wanda, SparseGpt]


@hookimpl
def ao_propose_schemes(fqn: str, weight: torch.Tensor, sample: torch.Tensor | None) -> list[Any]:
    """Both schemes, where the weight is 2:4 already and they are not known to be slower than float."""
    from ao_sparsity.semi_structured import SemiSparse, SemiSparseInt8Dynamic

    rows = None if sample is None else sample.numel() // max(sample.shape[-1], 1)
    return [
        scheme
        for scheme in (SemiSparse(), SemiSparseInt8Dynamic())
        if scheme.rejects(weight) is None
        and scheme.slower(weight, rows=rows) is None
        and scheme.rejects_values(weight) is None
    ]
