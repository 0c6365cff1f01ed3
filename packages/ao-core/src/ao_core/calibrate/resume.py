"""Files that let a walk go on where it was killed: one for each finished block, and what they belong to.

``walk.json`` holds fingerprints of the model, the data and the options; ``block-00003.safetensors`` the
parameters that the stage changed, and what algorithms noted. Each is written under another name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ao_core.calibrate import processes
from ao_core.calibrate.batches import tensors
from ao_core.checkpoint import describe_tensor, owned, plain_parts, read_tensor
from ao_core.errors import CheckpointError
from ao_core.scheme import parse_scheme
from ao_core.tensor import QuantizedTensor

logger = logging.getLogger(__name__)
_INDEX = "walk.json"


class Resume:
    """The finished stages of a walk in ``directory``.

    Args:
        directory: new, empty, or of an earlier run with the same ``parts``.
        parts: what a run depends on, each as a text: the model, the data, the options.

    Raises:
        CheckpointError: the directory can't be written, or belongs to another run; the message says what
            differs.
    """

    def __init__(self, directory: str | os.PathLike[str], parts: Mapping[str, str]) -> None:
        self.path = Path(directory)
        index = self.path / _INDEX
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if index.is_file():
                _compare(index, parts)
            elif others := sorted(entry.name for entry in self.path.iterdir()):
                raise CheckpointError(
                    f"can't keep a walk in {self.path}: it holds {', '.join(others[:3])} and no {_INDEX}. "
                    "Give a new or empty directory."
                )
            processes.gathered(None)  # all have looked
            if processes.rank() == 0 and not index.is_file():
                _write(index, json.dumps(dict(parts), indent=1).encode())
        except OSError as error:
            raise CheckpointError(
                f"can't keep a walk in {self.path}: {error.strerror or error}. Give another directory."
            ) from error

    def done(self) -> int:
        """How many stages are finished, from the first on."""
        number = 0
        while self._file(number).is_file():
            number += 1
        return int(processes.gathered(number)[0])

    def store(
        self, number: int, changed: Mapping[str, nn.Parameter], notes: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Keep what stage ``number`` changed, parameters by qualified name, and its notes."""
        if processes.rank() == 0:
            first: dict[int, str] = {}
            aliases = {name: first.setdefault(id(value), name) for name, value in changed.items()}
            state = {name: _portable(changed[name]) for name in first.values()}
            parts: dict[str, torch.Tensor] = {}
            for name, value in state.items():
                parts |= plain_parts(name, value) if isinstance(value, QuantizedTensor) else {name: value}
            said = {
                "tensors": {name: describe_tensor(name, value) for name, value in state.items()},
                "aliases": aliases,
                "notes": notes,
            }
            temporary = self._file(number).with_suffix(".tmp")
            save_file(
                owned({k: v.cpu() for k, v in parts.items()}), temporary, metadata={"ao": json.dumps(said)}
            )
            _rename(temporary, self._file(number))
        processes.gathered(None)  # nobody goes on before it is there

    def load(
        self, number: int, device: torch.device
    ) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
        """What :meth:`store` kept: tensors by name, those of one parameter the same object; and the notes.

        Raises:
            CheckpointError: the file is damaged.
        """
        file = self._file(number)
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                said = json.loads(shard.metadata()["ao"])
                found: dict[str, torch.Tensor] = {}
                for name, record in said["tensors"].items():
                    scheme = parse_scheme(record["scheme"]["name"]) if record else None
                    scheme = type(scheme).from_dict(record["scheme"]) if scheme is not None else None
                    value = read_tensor(shard, name, record, scheme)
                    found[name] = value.repacked() if isinstance(value, QuantizedTensor) else value
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{file} is damaged ({error}). Delete it and those with higher numbers, and run again."
            ) from error
        logger.info("stage %d was finished before: read from %s", number, file)
        return {name: found[held] for name, held in said["aliases"].items()}, said["notes"]

    def _file(self, number: int) -> Path:
        return self.path / f"block-{number:05d}.safetensors"


def checksum(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes, and sums of all bytes with and without their places."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach()
        for _, part in plain_parts("", flat).items() if isinstance(flat, QuantizedTensor) else [("", flat)]:
            digest.update(f"{_sums(part)}".encode())
    return digest.hexdigest()


def data_checksum(batches: Iterable[Any]) -> str:
    """:func:`checksum` of the tensors of all batches."""
    return checksum((str(n), tensor) for n, batch in enumerate(batches) for tensor in tensors(batch))


def _sums(tensor: torch.Tensor) -> list[int]:
    found: list[int] = []
    data = tensor.contiguous().view(-1)
    if data.numel():
        data = data.view(torch.uint8 if data.element_size() % 2 else torch.int16)
    for part in data.split(1 << 22):
        wide = part.long()
        places = torch.arange(1, wide.numel() + 1, device=wide.device)
        found += [int(wide.sum()), int((wide * places).sum())]
    return found


def _portable(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return value.portable() if isinstance(value, QuantizedTensor) else value


def _compare(index: Path, parts: Mapping[str, str]) -> None:
    try:
        held = json.loads(index.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{index} is damaged ({error}). Delete its directory to begin anew.") from error
    if other := [part for part in parts if held.get(part) != parts[part]]:
        raise CheckpointError(
            f"{index.parent} holds a walk with another {' and '.join(other)}, which can't be resumed by this "
            "one. Give the same again, or another directory."
        )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    _rename(temporary, path)


def _rename(temporary: Path, path: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
