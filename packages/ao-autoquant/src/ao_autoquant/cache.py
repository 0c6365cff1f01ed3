"""What was measured before: a file that searches read and write.

SQLite, so that processes can share it. A row is keyed by all that decides the number, as JSON. A transaction
waits for the disk, so that what is measured within a second goes into one. The file lies in the platform's
cache directory; ``AO_CACHE_DIR`` names another directory, ``AO_AUTOQUANT_CACHE`` another file, or is ``off``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import time
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

_FORMAT = 1
_TOGETHER_S = 1.0  # rows of so long are written at once
_SCHEMA = "CREATE TABLE IF NOT EXISTS measured (key TEXT PRIMARY KEY, value TEXT NOT NULL)"


def path() -> Path | None:
    """The file, or None if it is turned off."""
    named = os.environ.get("AO_AUTOQUANT_CACHE", "")
    if named == "off":
        return None
    folder = Path(os.environ.get("AO_CACHE_DIR") or user_cache_path("ao"))
    return Path(named) if named else folder / "autoquant" / "measured.sqlite"


class Cache:
    """Numbers by key. Without a usable file it holds them for this search only, and warns once.

    A context: what is not written yet is written when the block is left, by an exception or Ctrl-C too, and
    when the process ends.
    """

    def __init__(self, *, reread: bool = True) -> None:
        self._file = path()
        self._known: dict[str, dict[str, Any]] = {}
        self._waiting: dict[str, str] = {}
        self._written = -math.inf
        self.hits = 0
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._open(self._file, reread)
            except (OSError, sqlite3.Error) as error:
                self._give_up(error)
        weakref.finalize(self, _write, self._file, self._waiting)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What is known under ``key``, or None."""
        found = self._known.get(_text(key))
        self.hits += found is not None
        return found

    def put(self, key: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Keep ``value``, for this process at once, for every other one within a second or with the next."""
        self._known[_text(key)] = dict(value)
        if self._file is None:
            return
        self._waiting[_text(key)] = json.dumps(value, sort_keys=True)
        if time.monotonic() - self._written >= _TOGETHER_S:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet, for every other process."""
        try:
            _write(self._file, self._waiting)
        except (OSError, sqlite3.Error) as error:
            self._waiting.clear()
            self._give_up(error)
        self._written = time.monotonic()

    def _open(self, file: Path, reread: bool) -> None:
        try:
            self._read(file, reread)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, read-only: the file may be sound
                raise
            aside = file.with_suffix(".unusable")
            file.replace(aside)
            warnings.warn(
                f"the measurements in {file} are not used: {error}. They are kept as {aside}.",
                RuntimeWarning,
                stacklevel=4,
            )
            self._read(file, reread)

    def _read(self, file: Path, reread: bool) -> None:
        with contextlib.closing(sqlite3.connect(file, timeout=30)) as store, store:
            ((version,),) = store.execute("PRAGMA user_version")
            if version not in (0, _FORMAT):
                raise sqlite3.DatabaseError(f"its format is {version}, and this version reads {_FORMAT}")
            if version == 0:
                store.execute(_SCHEMA)
                store.execute(f"PRAGMA user_version = {_FORMAT}")
            for key, value in store.execute("SELECT key, value FROM measured") if reread else ():
                with contextlib.suppress(ValueError):
                    self._known[key] = json.loads(value)

    def _give_up(self, error: Exception) -> None:
        warnings.warn(
            f"measurements can't be kept in {self._file}: {error}. Name a file that can be written in "
            "AO_AUTOQUANT_CACHE, or a directory in AO_CACHE_DIR.",
            RuntimeWarning,
            stacklevel=4,
        )
        self._file = None


def _write(file: Path | None, waiting: dict[str, str]) -> None:
    """Rows in one transaction; ``waiting`` is empty afterwards."""
    if file is None or not waiting:
        return
    with contextlib.closing(sqlite3.connect(file, timeout=30)) as store, store:
        store.executemany("INSERT OR REPLACE INTO measured VALUES (?, ?)", list(waiting.items()))
    waiting.clear()


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
