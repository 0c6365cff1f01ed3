"""The file that the kernel suite writes and ``compare.py`` reads: one cell for each kernel and problem.

``about`` says where the cells were measured; ``cells`` are ours and those of plugins, ``peers`` other
libraries', by ``op NxK M=rows provider``; ``not_run`` holds why a cell has no time.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import torch

import ao_core as ao

FORMAT = 1
SAME = ("device", "device_name", "threads")  # of ``about``: cells of others can't be compared
THREADS = 2  # of a host: what the numbers in the documents were measured with
LIBRARIES = ("triton", "torchao", "bitsandbytes", "gemlite")


def cell_name(op: str, n: int, k: int, rows: int, provider: str) -> str:
    return f"{op} {n}x{k} M={rows} {provider}"


def about(device: torch.device) -> dict[str, str]:
    """Device and versions."""
    found = {**ao.fingerprint(device), "ao": ao.__version__}
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    else:
        found["threads"] = str(THREADS)
    held = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    found |= {name: held[name] for name in LIBRARIES if name in held}
    return found


def elsewhere(one: dict[str, str], other: dict[str, str]) -> str:
    """How the devices of two files differ, or nothing."""
    pairs = [(key, one.get(key, ""), other.get(key, "")) for key in SAME]
    return ", ".join(f"{key} {a!r} and {b!r}" for key, a, b in pairs if a != b)


def read(path: Path) -> dict:
    """A results file.

    Raises:
        ValueError: it is none, or of another format.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as kernel results: {error}") from error
    if not isinstance(data, dict) or "cells" not in data:
        raise ValueError(
            f"{path} holds no kernel results. Make it with hatch run bench:kernels --results FILE."
        )
    if data.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {data.get('format')}, and this version reads {FORMAT}. Measure again."
        )
    return data


class Results:
    """What a run found; a file, if there is one, is written after each cell, so that a run may be cut off.

    Args:
        device: that is measured on.
        path: the file, or None. One of the same device and versions is added to.

    Raises:
        ValueError: the file is of another device or other versions, or is none.
    """

    def __init__(self, device: torch.device, path: Path | None = None) -> None:
        self.path = path
        here = about(device)
        self.data: dict = {
            "format": FORMAT,
            "command": "hatch run bench:kernels --results FILE",
            "about": here,
            "ceilings": {},
            "cells": {},
            "peers": {},
            "not_run": {},
        }
        self.tried: set[str] = set()
        if path is not None and path.exists():
            held = read(path)
            # Libraries beside ours come and go between runs that fill one file.
            keys = [key for key in {*here, *held["about"]} if key not in LIBRARIES[1:]]
            differ = [key for key in keys if here.get(key) != held["about"].get(key)]
            if differ:
                parts = [
                    f"{key} {held['about'].get(key)!r}, here {here.get(key)!r}" for key in sorted(differ)
                ]
                raise ValueError(f"{path} was measured elsewhere ({'; '.join(parts)}). Name another file.")
            self.data = {**held, "about": {**held["about"], **here}}

    def add(self, name: str, numbers: dict[str, float] | str, *, peer: bool = False) -> None:
        """Numbers of a cell, or the reason why there are none; what was held of it is replaced."""
        kind = "not_run" if isinstance(numbers, str) else "peers" if peer else "cells"
        for part in ("cells", "peers", "not_run"):
            self.data[part].pop(name, None)
        rounded = numbers if isinstance(numbers, str) else {key: round(n, 4) for key, n in numbers.items()}
        self.data[kind][name] = rounded
        self.tried.add(name)
        self.write()

    def write(self) -> None:
        """Through a temporary name, in one step."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".part")
        scratch.write_text(
            json.dumps(self.data, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8"
        )
        scratch.replace(self.path)
