"""Named things that plugins provide, and what went wrong while loading them.

The registries are filled by :mod:`ao_core.plugins` on the first look-up. This module imports nothing of
ao_core but its errors, so that every other module may read from it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ao_core.errors import UnknownNameError

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Who provides an item: the entry point's name, and the distribution it was installed with."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class Fault:
    """Why a plugin, or one of its names, is not usable.

    ``stage`` is one of ``requires``, ``import``, ``hooks``, ``answer``, ``clash``.
    """

    plugin: str
    distribution: str
    stage: str
    error: str
    hint: str

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} of {self.distribution}, {self.stage}: {self.error}. {self.hint}"


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered item and its source."""

    item: T
    source: Source


FAULTS: list[Fault] = []
DISABLED: list[str] = []  # plugins that AO_DISABLE_PLUGINS leaves out
_loader: Callable[[], None] | None = None


def set_loader(loader: Callable[[], None]) -> None:
    """Install the function that fills the registries; called on every look-up, so it must be quick."""
    global _loader
    _loader = loader


def ensure_loaded() -> None:
    """Load the plugins if they are not loaded yet."""
    if _loader is not None:
        _loader()


_every: list[Registry[Any]] = []  # so that a name that is another kind's can be told


class Registry(Generic[T]):
    """Items of one kind by name."""

    def __init__(self, kind: str) -> None:
        _every.append(self)
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}
        self._disputed: dict[str, str] = {}

    def entry(self, name: str) -> Entry[T]:
        """The entry called ``name``.

        Raises:
            UnknownNameError: naming the nearest names, and the plugins that failed to load or are left out.
        """
        ensure_loaded()
        if name not in self._entries:
            raise UnknownNameError(self._unknown(name))
        return self._entries[name]

    def get(self, name: str) -> T:
        """The item called ``name``; raises as :meth:`entry` does."""
        return self.entry(name).item

    def entries(self) -> dict[str, Entry[T]]:
        """All entries, sorted by name."""
        ensure_loaded()
        return dict(sorted(self._entries.items()))

    def __contains__(self, name: str) -> bool:
        ensure_loaded()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries())

    def add(self, name: str, item: T, source: Source) -> None:
        """Register ``item``; the plugin loader has already ruled out a clash."""
        self._entries[name] = Entry(item, source)

    def dispute(self, name: str, why: str) -> None:
        """Mark ``name`` as claimed by two plugins and so unusable."""
        self._entries.pop(name, None)
        self._disputed[name] = why

    def clear(self) -> None:
        """Forget everything; the next look-up loads the plugins again if the loader allows it."""
        self._entries.clear()
        self._disputed.clear()

    def _unknown(self, name: str) -> str:
        if name in self._disputed:
            return f"{self.kind} {name!r} is not usable: {self._disputed[name]}"
        known = sorted(self._entries)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        parts = [f"unknown {self.kind} {name!r}."]
        if near:
            parts.append(f"Did you mean {' or '.join(map(repr, near))}?")
        for other in _every:
            if name in other._entries:
                article = "an" if other.kind[0] in "aeiou" else "a"
                parts.append(f"It is the name of {article} {other.kind}.")
        parts.append(f"Installed: {', '.join(known) or 'none'}.")
        if not known:
            parts.append("Install a package that provides some, such as ao-quant.")
        if DISABLED:
            parts.append(f"Left out by AO_DISABLE_PLUGINS: {', '.join(DISABLED)}.")
        parts += [f"Not loaded: {fault}" for fault in FAULTS]
        return " ".join(parts)
