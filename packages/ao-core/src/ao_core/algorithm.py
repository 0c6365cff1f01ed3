"""What needs data: calibration algorithms such as SmoothQuant, GPTQ and Wanda."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from ao_core.errors import OptionError
from ao_core.registry import Registry
from ao_core.scheme import split_text

if TYPE_CHECKING:
    from torch import nn

    from ao_core.plan import Plan


@runtime_checkable
class Algorithm(Protocol):
    """Changes a model by looking at the inputs that its layers see.

    A dataclass: its fields are its options, each with a default. One that works on a block at a time
    derives from :class:`ao_core.BlockAlgorithm`, which gives :meth:`run`.
    """

    name: ClassVar[str]

    def run(self, model: nn.Module, plan: Plan, batches: Iterable[Any]) -> Any:
        """Compress ``model`` in place along ``plan``, calibrated on ``batches``; returns a Report."""
        ...


def parse_algorithm(text: str | Algorithm, **options: Any) -> Algorithm:
    """The algorithm that a text such as ``"smoothquant:alpha=0.5"`` names.

    Args:
        text: ``NAME`` or ``NAME:OPTION=VALUE,...``. A value that holds commas itself, such as a scheme
            with options, is put in brackets. An :class:`Algorithm` is returned as it is.
        **options: more options; these win over those in the text.

    Raises:
        UnknownNameError: no installed plugin provides that algorithm.
        OptionError: an option it does not have, or a value it does not take.
    """
    if not isinstance(text, str):
        return text
    name, given = split_text(text)
    return _make(ALGORITHMS.get(name), {**given, **options})


def algorithms() -> dict[str, type[Algorithm]]:
    """Every installed algorithm class by name, sorted."""
    return {name: entry.item for name, entry in ALGORITHMS.entries().items()}


def _make(kind: type[Algorithm], options: Mapping[str, Any]) -> Algorithm:
    known: list[str] = []
    if dataclasses.is_dataclass(kind):
        known = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(set(options) - set(known)):
        raise OptionError(
            f"algorithm {kind.name!r} has no option {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(known) or 'none'}."
        )
    return kind(**options)


ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm")
