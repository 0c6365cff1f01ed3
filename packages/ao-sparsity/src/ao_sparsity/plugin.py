"""What ao-sparsity registers."""

from __future__ import annotations

from typing import Any

from ao_core import hookimpl


@hookimpl
def ao_register_algorithms() -> list[Any]:
    """Magnitude pruning, Wanda, SparseGPT."""
    from ao_sparsity.algorithm import Magnitude, SparseGpt, Wanda

    return [Magnitude, Wanda, SparseGpt]
