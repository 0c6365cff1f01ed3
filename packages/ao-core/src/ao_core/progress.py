"""A progress bar on a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def reporting(description: str, *, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Inside the block, call the result with (done, total) to show how far it is."""
    if not enabled:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty():
        console.print(f"{description} ...")
        yield lambda done, total: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def track(items: Sequence[T], description: str, *, enabled: bool = True) -> Iterator[T]:
    """Iterate over ``items``, showing how far it is."""
    with reporting(description, enabled=enabled) as show:
        for done, item in enumerate(items):
            show(done, len(items))
            yield item
