"""What ao-autoquant registers."""

from __future__ import annotations

from typing import Any

from ao_core import hookimpl


@hookimpl
def ao_register_commands() -> list[Any]:
    """``ao autoquant`` and ``ao plan``."""
    from ao_autoquant.commands import autoquant, plan
    from ao_core import Command

    return [Command("autoquant", autoquant), Command("plan", plan)]
