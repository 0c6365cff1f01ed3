"""What needs data: calibration algorithms such as SmoothQuant, GPTQ and Wanda."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from ao_core.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from ao_core.plan import Plan


@runtime_checkable
class Algorithm(Protocol):
    """Changes a model by looking at the inputs that its layers see."""

    name: ClassVar[str]

    def run(self, model: nn.Module, plan: Plan, batches: Iterable[Any]) -> Any:
        """Compress ``model`` in place along ``plan``, calibrated on ``batches``; returns a report."""
        ...


ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm")
