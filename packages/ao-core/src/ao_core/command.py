"""A subcommand of ``ao`` that a plugin adds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: as typed after ``ao``, lower case with hyphens; two words for one below ``ao kernels``, which is
            ao's own.
        run: a function annotated for typer, or a ``typer.Typer`` app (a group of commands).
    """

    name: str
    run: Callable[..., Any]

    def invalid(self) -> str | None:
        """Why the command can't be registered, or None."""
        if not isinstance(self.name, str) or not re.fullmatch(r"(kernels )?[a-z][a-z0-9-]*", self.name):
            return f"name {self.name!r} must be lower case letters, digits and hyphens"
        return None if callable(self.run) else "run must be a function or a typer app"
