"""Measure every installed scheme on every layer of a model, and choose under a budget."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ao_autoquant.exploration import Exploration, explore
    from ao_autoquant.pipeline import autoquant
    from ao_autoquant.search import Budget, InfeasibleError

__version__ = "0.1.0"
__all__ = ["Budget", "Exploration", "InfeasibleError", "__version__", "autoquant", "explore"]

_HOME = {
    "Budget": "search",
    "Exploration": "exploration",
    "InfeasibleError": "search",
    "autoquant": "pipeline",
    "explore": "exploration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ao_autoquant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ao_autoquant.{_HOME[name]}"), name)
