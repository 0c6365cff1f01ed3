"""The files of a checkpoint: safetensors shards with checksums, and the one file that commits them.

Shards are named by their content and never overwritten with another; ``ao.json`` is replaced last, in
one step. Whenever a save is interrupted, the directory holds the old checkpoint or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ao_core.errors import CheckpointError

logger = logging.getLogger(__name__)

INDEX = "ao.json"
SCRATCH = ".ao-saving"
COMPANIONS = "companions"


def layout(groups: Mapping[str, Mapping[str, torch.Tensor]], limit: int) -> list[list[str]]:
    """Distribute groups of tensors over shards of at most ``limit`` bytes, a group never split."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensors in groups.items():
        size = sum(tensor.nbytes for tensor in tensors.values())
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


class Writer:
    """Writes into a checkpoint directory; nothing counts until :meth:`commit`.

    Files go to a scratch folder first. If the block ends without a commit, whatever is new is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scratch = path / SCRATCH
        self.files: dict[str, dict[str, Any]] = {}
        self._new: list[Path] = []
        self._mode = 0o666 & ~_umask()  # safetensors writes files that only their owner may read

    def shard(self, tensors: Mapping[str, torch.Tensor], number: int, total: int) -> str:
        """Write one shard; returns its name, and keeps its size and SHA-256 in ``files``."""
        temporary = self.scratch / f"{number}.safetensors"
        try:
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(None, str(error)) from error
        temporary.chmod(self._mode)
        _sync(temporary)
        digest = sha256(temporary)
        final = self.path / f"model-{digest[:8]}-{number:05d}-of-{total:05d}.safetensors"
        if not final.exists():
            self._new.append(final)
        self.files[final.name] = {"bytes": temporary.stat().st_size, "sha256": digest}
        temporary.replace(final)
        return final.name

    def companions(self) -> dict[str, str]:
        """SHA-256 of each file that travels along, by its path in the checkpoint."""
        folder = self.scratch / COMPANIONS
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): sha256(path) for path in files}

    def commit(self, index: str) -> None:
        """Replace ``ao.json`` in one step, then delete the shards of an earlier save."""
        temporary = self.scratch / INDEX
        temporary.write_text(index, encoding="utf-8")
        _sync(temporary)  # a full disk ends here: from now on files are only renamed
        for companion in sorted((self.scratch / COMPANIONS).glob("*")):
            if (old := self.path / companion.name).is_dir():
                shutil.rmtree(old)
            companion.replace(old)
        temporary.replace(self.path / INDEX)
        self._new.clear()
        for shard in self.path.glob("model-????????-?????-of-?????.safetensors"):
            if shard.name not in self.files:
                _remove(shard)

    def discard(self) -> None:
        """Remove the scratch folder, and what is new if there was no commit."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for path in self._new:
            path.unlink(missing_ok=True)


@contextmanager
def writer(path: Path, needed: int) -> Iterator[Writer]:
    """A :class:`Writer` into ``path``, which is made, and removed again if the save fails.

    Raises:
        CheckpointError: ``path`` is a file, not writable, holds something else, or lacks ``needed``
            bytes of space; or writing failed.
    """
    made = not path.exists()
    check_target(path)
    out = Writer(path)
    try:
        shutil.rmtree(out.scratch, ignore_errors=True)
        (out.scratch / COMPANIONS).mkdir(parents=True)
        _check_space(path, needed)
        yield out
    except OSError as error:
        raise CheckpointError(
            f"can't write to {path}: {error.strerror or error}. What was there before is unchanged. "
            "Free some space or give another directory."
        ) from error
    finally:
        out.discard()
        if made and path.exists() and not any(path.iterdir()):
            path.rmdir()


def check_target(directory: str | os.PathLike[str]) -> None:
    """Raise :class:`CheckpointError` unless a checkpoint can be written to ``directory``."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"can't save to {path}: it is a file. Give a directory.")
    existing = path
    while not existing.exists():
        existing = existing.parent
    try:
        tempfile.TemporaryDirectory(prefix=SCRATCH, dir=existing).cleanup()
    except OSError as error:
        raise CheckpointError(
            f"can't save to {path}: {existing} is not writable ({error.strerror}). Give another directory."
        ) from error
    if path.exists():
        others = [p.name for p in path.iterdir()]
        if others and INDEX not in others and SCRATCH not in others:  # the latter: a save was killed
            raise CheckpointError(
                f"can't save to {path}: it holds {', '.join(sorted(others)[:3])} and no {INDEX}, so it is "
                "not a checkpoint of ao. Give a new or empty directory."
            )


def read_index(path: Path) -> dict[str, Any]:
    """The contents of ``ao.json`` in ``path``.

    Raises:
        CheckpointError: missing, or not JSON.
    """
    index = path / INDEX
    if not index.is_file():
        what = "it does not exist" if not path.exists() else f"it holds no {INDEX}"
        raise CheckpointError(
            f"{path} is no checkpoint of ao: {what}. ao_core.save and 'ao quantize' write one."
        )
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{index} is corrupt: {error}. Copy or make the checkpoint again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{index} is corrupt: not a JSON object. Copy or make the checkpoint again.")
    return data


def seal(index: Mapping[str, Any]) -> str:
    """SHA-256 of what ``ao.json`` says, its own ``sha256`` aside."""
    said = json.loads(json.dumps({key: value for key, value in index.items() if key != "sha256"}))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def check_seal(path: Path, index: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` unless ``ao.json`` says what was written."""
    if index.get("sha256") != seal(index):
        raise CheckpointError(
            f"{path / INDEX} is corrupt: it does not have the SHA-256 that it names. Copy it again."
        )


def check_companions(path: Path, companions: Mapping[str, str]) -> None:
    """Warn of each file that is not as it was saved; the model itself does not depend on them."""
    for name, digest in companions.items():
        file = path / name
        if not file.is_file() or sha256(file) != digest:
            logger.warning("%s is not as it was saved with the model: it is damaged, edited or missing", file)


def verify(path: Path, files: Mapping[str, Mapping[str, Any]], *, checksums: bool) -> None:
    """Raise :class:`CheckpointError`, naming the file, unless every shard is as it was written."""
    for name, record in files.items():
        shard = path / name
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing. Copy the checkpoint again, with all its files.")
        size = shard.stat().st_size
        if size != record["bytes"]:
            raise CheckpointError(
                f"{shard} is truncated: {size} bytes of {record['bytes']}. Copy it again."
                if size < record["bytes"]
                else f"{shard} has {size} bytes and should have {record['bytes']}. Copy it again."
            )
        if checksums and sha256(shard) != record["sha256"]:
            raise CheckpointError(
                f"{shard} is corrupt: its SHA-256 is not the one in {INDEX}. Copy it again."
            )


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if needed > free:
        raise CheckpointError(
            f"can't save to {path}: {needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free. "
            "Free some space or give another directory."
        )


def _remove(stale: Path) -> None:
    """Delete a shard that nothing refers to any more; the new checkpoint stands even if that fails."""
    try:
        stale.unlink()
    except OSError as error:
        logger.warning("%s is left over from an earlier save and can't be removed: %s", stale, error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
