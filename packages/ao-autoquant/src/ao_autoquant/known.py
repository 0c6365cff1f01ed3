"""What an earlier search found, from its exploration or from a plan, perhaps on another device."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ao_autoquant.measuring import Faulty
from ao_autoquant.search import FLOAT, Option
from ao_core import Plan, PlanError

if TYPE_CHECKING:
    from ao_autoquant.exploration import Exploration

FORMAT = 1
_PLACE = ("device", "device_name", "threads", "torch")


@dataclass(frozen=True)
class Known:
    """Options of an earlier search, and what of them counts here.

    Attributes:
        options: layer → candidate → what was measured.
        calls: layer → rows → how often.
        times: whether times hold: they were measured on the same device, with the same torch and threads.
        errors: whether errors do: they were measured the same way on the same values and inputs.
    """

    options: Mapping[str, Mapping[str, Option]] = field(default_factory=dict)
    calls: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    times: bool = False
    errors: bool = False

    def error(self, layer: str, text: str) -> Option | None:
        """What holds of a candidate's error and bytes, or None."""
        return self.options.get(layer, {}).get(text) if self.errors else None

    def whole(self, layer: str, text: str, calls: Mapping[int, float]) -> Option | None:
        """What holds of a candidate altogether, or None."""
        same = self.times and self.calls.get(layer) == calls
        return self.error(layer, text) if same else None


def known_from(earlier: Plan | Exploration | None, fingerprint: Mapping[str, str], source: str) -> Known:
    """What of ``earlier`` holds where ``fingerprint`` says, for errors that depend on ``source``."""
    if earlier is None:
        return Known()
    here = all(earlier.fingerprint.get(key) == fingerprint[key] for key in _PLACE)
    if not isinstance(earlier, Plan):
        return Known(earlier.options, earlier.calls, here, earlier.source == source)
    options: dict[str, dict[str, Option]] = {}
    calls: dict[str, dict[int, float]] = {}
    sources = set()
    for layer, choice in earlier.layers.items():
        said = choice.evidence
        if not {"us", "spread", "bytes", "error", "float_us", "calls", "source"} <= set(said):
            continue
        base = Option(said["float_us"], said["float_spread"], said["float_bytes"], 0.0)
        mine = Option(said["us"], said["spread"], said["bytes"], said["error"])
        options[layer] = {FLOAT: base, choice.scheme or FLOAT: mine}
        calls[layer] = {int(rows): count for rows, count in said["calls"].items()}
        sources.add(said["source"])
    return Known(options, calls, here, sources == {source})


def load(path: str | os.PathLike[str]) -> Plan | Exploration:
    """A plan, or what :meth:`Exploration.save` wrote.

    Raises:
        PlanError: the file can't be read, or is neither.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        found = isinstance(data, dict) and "options" in data
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{path} can't be read: {error}. Give a plan or an exploration that ao wrote."
        ) from error
    return from_data(data) if found else Plan.load(path)


def from_data(data: Mapping[str, Any]) -> Exploration:
    """The inverse of :meth:`Exploration.to_json`, of its data.

    Raises:
        PlanError: it is no exploration, or of another format version.
    """
    from ao_autoquant.exploration import Exploration

    try:
        given = dict(data)
        if (version := given.pop("format")) != FORMAT:
            raise PlanError(
                f"the exploration has format {version}, and this ao-autoquant reads format {FORMAT}. "
                "Search again."
            )
        given["options"] = {
            layer: {name: Option(**option) for name, option in each.items()}
            for layer, each in given["options"].items()
        }
        given["faults"] = [Faulty(**fault) for fault in given["faults"]]
        given["calls"] = {
            layer: {int(rows): count for rows, count in each.items()}
            for layer, each in given["calls"].items()
        }
        return Exploration(**given)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"this is no exploration: {error!r}. Give what Exploration.save wrote.") from error
