"""What ao-gptq registers."""

from __future__ import annotations

from typing import Any

from ao_core import hookimpl


@hookimpl
def ao_register_algorithms() -> list[Any]:
    """GPTQ."""
    from ao_gptq.algorithm import Gptq

    return [Gptq]
