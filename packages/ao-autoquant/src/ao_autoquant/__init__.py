"""Measure every installed scheme on every layer of a model, and choose under a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ao_autoquant.explore import Exploration, autoquant, explore
    from ao_autoquant.search import InfeasibleError

__version__ = "0.1.0"
__all__ = ["Exploration", "InfeasibleError", "__version__", "autoquant", "explore"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ao_autoquant' has no attribute {name!r}")
    from ao_autoquant import explore, search

    return getattr(search if name == "InfeasibleError" else explore, name)
