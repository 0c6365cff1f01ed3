"""A subcommand of ``ao`` that a plugin adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: as typed after ``ao``, lower case with hyphens.
        run: a function annotated for typer, or a ``typer.Typer`` app (a group of commands).
    """

    name: str
    run: Callable[..., Any]
