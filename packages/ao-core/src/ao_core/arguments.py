"""What commands are given as text, ao's own and those of plugins: devices, dtypes, sizes of problems."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from ao_core.errors import OptionError

if TYPE_CHECKING:
    import torch

Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the model's own.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


def parse_dtype(text: str | None) -> torch.dtype | None:
    """The torch dtype that ``text`` names, or None.

    Raises:
        OptionError: another word.
    """
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text is not None and text not in known:
        raise OptionError(f"--dtype takes {', '.join(known)}, and was given {text!r}.")
    return None if text is None else known[text]


def parse_device(text: str) -> torch.device:
    """The torch device that ``text`` names.

    Raises:
        OptionError: not a device, or one that is not present.
    """
    import torch

    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"--device {text!r} can't be used: {reason}. Try cpu.") from error
    if device.type == "meta":
        raise OptionError("--device 'meta' can't be used: it holds no values. Try cpu.")
    return device


def parse_shapes(texts: Iterable[str]) -> list[tuple[int, int]]:
    """``(n, k)`` of each text ``NxK``: outputs and inputs of a linear.

    Raises:
        OptionError: another text.
    """
    found = []
    for text in texts:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise OptionError(f"--shape takes NxK, such as 14336x4096, and was given {text!r}.")
        found.append((int(match[1]), int(match[2])))
    return found


def parse_rows(text: str) -> list[int]:
    """The numbers of rows in ``M,M,...``.

    Raises:
        OptionError: another text, or none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise OptionError(f"--rows takes whole numbers above 0, separated by commas, and was given {text!r}.")
    return [int(part) for part in parts]
