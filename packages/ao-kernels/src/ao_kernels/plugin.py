"""What ao-kernels registers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from ao_core import hookimpl


@hookimpl
def ao_register_kernels() -> list[Any]:
    """Triton kernels; Triton is imported when the first one runs."""
    return list(_kernels())


@hookimpl
def ao_register_commands() -> list[Any]:
    """``ao kernels tune``."""
    from ao_core import Command
    from ao_kernels.commands import tune

    return [Command("kernels tune", tune)]


def _kernels() -> Iterator[Any]:
    import torch

    from ao_core import Kernel, Key
    from ao_core.triton_support import priority, providers
    from ao_kernels import experts, float8_linear, int4_linear, int8_linear, nf4_linear
    from ao_kernels.support import HALVES, rejects

    found: dict[str, tuple[Callable[..., Any], Callable[[Key], str | None]]] = {
        "int4_weight_linear": (int4_linear.linear, int4_linear.misfit),
        "nf4_linear": (nf4_linear.linear, nf4_linear.misfit),
        "int8_weight_linear": (int8_linear.weight_linear, int8_linear.weight_misfit),
        "int8_dynamic_linear": (int8_linear.dynamic_linear, int8_linear.dynamic_misfit),
        "int8_dynamic_int4_linear": (int4_linear.dynamic_linear, int4_linear.misfit),
        "float8_weight_linear": (float8_linear.linear, float8_linear.misfit),
        "float8_dynamic_linear": (float8_linear.dynamic_linear, float8_linear.dynamic_misfit),
        "int4_experts_linear": (experts.int4_linear, int4_linear.misfit),
        "nf4_experts_linear": (experts.nf4_linear, nf4_linear.misfit),
        "int8_experts_linear": (experts.int8_linear, int8_linear.weight_misfit),
        "float8_experts_linear": (experts.float8_linear, float8_linear.misfit),
    }
    bytes_: dict[str, tuple[Callable[..., Any], Callable[[Key], str | None]]] = {
        "nf4_dequantize": (nf4_linear.dequantize, nf4_linear.dequantize_misfit),
    }
    integers: dict[str, tuple[Callable[..., Any], Callable[[Key], str | None]]] = {
        "int8_mm": (int8_linear.mm, int8_linear.mm_misfit),
        "int8_scaled_mm": (int8_linear.scaled_mm, int8_linear.mm_misfit),
    }
    for provider in providers():
        for op, (fn, misfit) in (found | bytes_ | integers).items():
            dtypes = (torch.int8,) if op in integers else (torch.uint8,) if op in bytes_ else HALVES
            yield Kernel(
                op,
                provider,
                fn,
                priority=priority(provider),
                rejects=functools.partial(rejects, provider=provider, weights=misfit, dtypes=dtypes),
            )
