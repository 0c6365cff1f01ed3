"""GPTQ for ao, on any scheme: ``ao_core.compress_(model, "gptq:scheme=int4-weight-only", batches)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ao_gptq.recorder import InputRecorder

__version__ = "0.1.0"
__all__ = ["InputRecorder", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "InputRecorder":
        from ao_gptq.recorder import InputRecorder

        return InputRecorder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
