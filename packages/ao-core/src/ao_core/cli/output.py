"""How the command line speaks: tables and results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

errors = Console(stderr=True, highlight=False)
results = Console(highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; long cells wrap, but for those of the first column; numbers are right-aligned."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = all(_is_number(row[index]) for row in cells) and bool(cells)
        justify: Literal["left", "right"] = "right" if numeric else "left"
        drawn.add_column(column, justify=justify, overflow="fold", no_wrap=index == 0)
    for row in cells:
        drawn.add_row(*map(escape, row))
    if title:
        results.print(escape(title), style="italic", soft_wrap=True)
    results.print(drawn)


def as_json(data: Any) -> None:
    """Print ``data`` as JSON, in which NaN and infinity become null."""
    print(json.dumps(_finite(data), indent=1, allow_nan=False))  # noqa: T201


def say(text: str) -> None:
    """A line about what is being done."""
    errors.print(escape(text), soft_wrap=True)


def warn(text: str) -> None:
    """A warning."""
    errors.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)


def fail(text: str) -> None:
    """An error."""
    errors.print(f"[red]error:[/] {escape(text)}", soft_wrap=True)


def show_log(verbose: bool) -> None:
    """Send log messages to standard error: warnings, and with ``verbose`` what was done too."""
    logging.getLogger("ao_core").setLevel(logging.INFO if verbose else logging.WARNING)
    logging.basicConfig(handlers=[_Lines()], force=True)


class _Lines(logging.Handler):
    """Each log message as a line, which is never cut."""

    def emit(self, record: logging.LogRecord) -> None:
        (warn if record.levelno >= logging.WARNING else say)(record.getMessage())


def megabytes(count: float) -> str:
    """Bytes as megabytes (10**6) with one decimal."""
    return f"{count / 1e6:.1f}"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _is_number(text: str) -> bool:
    return not text or text.lstrip("+-").replace(".", "", 1).replace(",", "").isdigit()
