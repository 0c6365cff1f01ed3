"""Tiles that were found by measuring: a file that launchers look into and ``ao kernels tune`` writes.

SQLite, so that processes can share it; keyed by device, versions, kind of weight, its shape, the
activations' dtype and the number of rows up to a power of two. ``AO_KERNELS_TILES`` names another
file, or is ``off``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from platformdirs import user_cache_path

from ao_core import AoError
from ao_kernels.configs import Decoded, Few, Gemm, Many, Parts, Registers, Specialized

Tiles = Few | Many | Specialized | Registers | Parts | Decoded | Gemm

KERNELS_VERSION = 6
"""Of the kernels: tiles that were found for other kernels are not used."""

MOST_ROWS = 8192
_FORMAT = 1
_CLASSES = {
    "few": Few, "many": Many, "specialized": Specialized, "registers": Registers, "parts": Parts,
    "decoded": Decoded, "gemm": Gemm,
}  # fmt: skip
_SCHEMA = """
CREATE TABLE IF NOT EXISTS tiles (
    device TEXT, kernels INTEGER, triton TEXT, torch TEXT, kind TEXT, n INTEGER, k INTEGER, dtype TEXT,
    rows INTEGER, tiles TEXT, microseconds REAL,
    PRIMARY KEY (device, kernels, triton, torch, kind, n, k, dtype, rows)
)"""
_FAULTS_SCHEMA = """
CREATE TABLE IF NOT EXISTS faults (
    device TEXT, kernels INTEGER, triton TEXT, torch TEXT, kind TEXT, tiles TEXT, reason TEXT,
    PRIMARY KEY (device, kernels, triton, torch, kind, tiles)
)"""
_WHERE = "device = ? AND kernels = ? AND triton = ? AND torch = ?"


@dataclasses.dataclass(frozen=True)
class Cell:
    """What tiles are found for.

    Attributes:
        kind: ``"int4"``, ``"nf4"``, ``"int8"``, ``"float8"``, or ``"int8-dynamic"``.
        n: columns of the output.
        k: columns of the input.
        dtype: of the activations, such as ``"bfloat16"``.
        rows: of the activations, a power of two.
    """

    kind: str
    n: int
    k: int
    dtype: str
    rows: int


def path() -> Path | None:
    """The file, or None if it is turned off."""
    named = os.environ.get("AO_KERNELS_TILES", "")
    if named == "off":
        return None
    folder = Path(os.environ.get("AO_CACHE_DIR") or user_cache_path("ao"))
    return Path(named) if named else folder / "kernels" / "tiles.sqlite"


def bucket(rows: int) -> int:
    """The power of two that ``rows`` are looked up under."""
    return min(1 << max(rows - 1, 0).bit_length(), MOST_ROWS)


def find(kind: str, rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tiles | None:
    """The tiles that were found for a call, or None."""
    known = _known(_device_name(device))
    return known.get(Cell(kind, n, k, str(dtype).removeprefix("torch."), bucket(rows))) if known else None


def saved(device: torch.device) -> dict[Cell, Tiles]:
    """All that was found for this device with these versions."""
    return dict(_known(_device_name(device)))


def save(cell: Cell, tiles: Tiles, microseconds: float, device: torch.device) -> None:
    """Keep what was found, for this and every other process.

    Raises:
        AoError: the file can't be written, or is turned off.
    """
    _insert("tiles", device, (*dataclasses.astuple(cell), to_text(tiles), microseconds))


def save_fault(kind: str, tiles: Tiles, reason: str, device: torch.device) -> None:
    """Keep that tiles hang, or crash, for weights of a kind: with these versions they are not tried again.

    Raises:
        AoError: as :func:`save`.
    """
    _insert("faults", device, (kind, to_text(tiles), reason))


def faults(kind: str, device: torch.device) -> dict[str, str]:
    """What :func:`save_fault` kept for this device with these versions: reasons by the tiles' ``repr``."""
    file = path()
    if file is None or not file.is_file():
        return {}
    _set_aside_if_unusable(file)
    found: dict[str, str] = {}
    with contextlib.suppress(sqlite3.OperationalError):  # a file from before there were any
        for text, reason in _rows(
            file, f"SELECT tiles, reason FROM faults WHERE {_WHERE} AND kind = ?",
            (*_versions(_device_name(device)), kind),
        ):  # fmt: skip
            with contextlib.suppress(KeyError, TypeError, ValueError):  # tiles of a later version
                found[repr(from_text(text))] = str(reason)
    return found


def _insert(table: str, device: torch.device, values: tuple[object, ...]) -> None:
    file = path()
    if file is None:
        raise AoError("AO_KERNELS_TILES=off, so tiles can't be kept. Unset it, or name a file.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _set_aside_if_unusable(file)
        with contextlib.closing(sqlite3.connect(file, timeout=30)) as store, store:
            store.execute(_SCHEMA)
            store.execute(_FAULTS_SCHEMA)
            store.execute(f"PRAGMA user_version = {_FORMAT}")
            row = (*_versions(_device_name(device)), *values)
            store.execute(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * len(row))})", row)
    except (OSError, sqlite3.Error) as error:
        raise AoError(
            f"can't write the tiles to {file}: {error}. Name a file that can be written in AO_KERNELS_TILES, "
            "or a directory in AO_CACHE_DIR."
        ) from error
    forget()


def forget() -> None:
    """Read the file again when tiles are next looked up."""
    _known.cache_clear()


def clear() -> None:
    """Delete what was found, on every device."""
    file = path()
    if file is not None:
        file.unlink(missing_ok=True)
    forget()


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _known(device_name: str) -> dict[Cell, Tiles]:
    file = path()
    if file is None or not file.is_file():
        return {}
    _set_aside_if_unusable(file)
    if not file.is_file():
        return {}
    found: dict[Cell, Tiles] = {}
    for *cell, text in _rows(
        file, f"SELECT kind, n, k, dtype, rows, tiles FROM tiles WHERE {_WHERE}", _versions(device_name)
    ):
        with contextlib.suppress(KeyError, TypeError, ValueError):  # tiles of a later version
            found[Cell(*cell)] = from_text(text)  # type: ignore[arg-type]
    return found


def _rows(file: Path, query: str, values: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    uri = f"{file.resolve().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30)) as store:
        yield from store.execute(query, values)


def _set_aside_if_unusable(file: Path) -> None:
    """A file that is no such table, or of another format, is renamed, with a warning."""
    if not file.exists():
        return
    try:
        ((version,),) = _rows(file, "PRAGMA user_version")
        reason = (
            "" if version in (0, _FORMAT) else f"its format is {version}, and this version reads {_FORMAT}"
        )
        if version == _FORMAT:
            list(_rows(file, "SELECT rows, tiles FROM tiles LIMIT 1"))
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            return
        reason = str(error)
    if reason:
        aside = file.with_suffix(".unusable")
        kept = f"It is kept as {aside}."
        try:
            file.replace(aside)
        except OSError:
            kept = "It is left where it is."
        text = f"the tiles in {file} are not used: {reason}. {kept} Run 'ao kernels tune' again."
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _versions(device_name: str) -> tuple[str, int, str, str]:
    import triton

    return device_name, KERNELS_VERSION, triton.__version__, torch.__version__


def to_text(tiles: Tiles) -> str:
    """JSON of tiles."""
    (name,) = (name for name, each in _CLASSES.items() if type(tiles) is each)
    return json.dumps({"kernel": name, **dataclasses.asdict(tiles)}, sort_keys=True)


def from_text(text: object) -> Tiles:
    """The tiles that :func:`to_text` wrote.

    Raises:
        KeyError, TypeError, ValueError: they are of a later version.
    """
    fields = json.loads(str(text))
    made: Tiles = _CLASSES[fields.pop("kernel")](**fields)
    return made
