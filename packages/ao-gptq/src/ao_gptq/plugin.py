"""What ao-gptq registers."""

from __future__ import annotations

import functools
from typing import Any

from ao_core import hookimpl


@hookimpl
def ao_register_algorithms() -> list[Any]:
    """GPTQ."""
    from ao_gptq.algorithm import Gptq

    return [Gptq]


@hookimpl
def ao_register_ops() -> list[Any]:
    """The column loop."""
    from ao_gptq.columns import GPTQ_COLUMNS

    return [GPTQ_COLUMNS]


@hookimpl
def ao_register_kernels() -> list[Any]:
    """The column loop in Triton, which is imported when it first runs."""
    from ao_core import Kernel, triton_support
    from ao_gptq import columns_triton

    return [
        Kernel(
            "gptq_columns",
            provider,
            columns_triton.columns,
            priority=triton_support.priority(provider),
            rejects=functools.partial(columns_triton.rejects, provider=provider),
        )
        for provider in triton_support.providers()
    ]
