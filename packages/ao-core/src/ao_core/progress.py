"""A progress bar on a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Show(Protocol):
    """Says how far something is."""

    def __call__(self, done: int, total: int, said: str = "", *, whole: bool = False) -> None:
        """Show ``done`` of ``total``, ``said`` beside it; a ``whole`` one also where there is no bar."""


@contextmanager
def reporting(description: str, *, enabled: bool = True) -> Iterator[Show]:
    """Inside the block, call the result with (done, total) to show how far it is."""

    def nothing(done: int, total: int, said: str = "", *, whole: bool = False) -> None:
        pass

    if not enabled:
        yield nothing
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty():
        console.print(f"{description} ...")

        def line(done: int, total: int, said: str = "", *, whole: bool = False) -> None:
            if said and whole:
                console.print(f"{done + 1} of {total}: {said}", soft_wrap=True, markup=False)

        yield line
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)

        def show(done: int, total: int, said: str = "", *, whole: bool = False) -> None:
            beside = "" if whole or not said else f" {said}"
            bar.update(task, completed=done, total=total, description=f"{description}{beside}")

        yield show


def track(items: Sequence[T], description: str, *, enabled: bool = True) -> Iterator[T]:
    """Iterate over ``items``, showing how far it is."""
    with reporting(description, enabled=enabled) as show:
        for done, item in enumerate(items):
            show(done, len(items))
            yield item
