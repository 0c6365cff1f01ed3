"""Whether Triton's kernels can run, and under which providers' names. Imports no Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ao_core.kernels import Key

TRITON, INTERPRETED = "triton", "triton_interpreted"


def interpreting() -> bool:
    """Whether Triton runs its kernels by an interpreter, on the CPU: ``TRITON_INTERPRET=1``, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def providers() -> tuple[str, ...]:
    """The names under which kernels are registered.

    Interpreted, they go by a name of their own with a low priority: they are slower than any other kernel.
    """
    return (TRITON, INTERPRETED) if interpreting() else (TRITON,)


def priority(provider: str) -> float:
    """Of kernels registered under one of :func:`providers`."""
    return -1 if provider == INTERPRETED else 20


def rejects(key: Key, provider: str) -> str | None:
    """Why Triton can't run a kernel for ``key`` here, or None.

    Args:
        key: of the call.
        provider: one of :func:`providers`.
    """
    if not _installed():
        return "triton is not installed: pip install triton"
    wanted = "cpu" if provider == INTERPRETED else "cuda"
    if key.device.type != wanted:
        return f"it runs on {wanted}, not on {key.device.type}"
    if provider == TRITON and interpreting():
        return "TRITON_INTERPRET is set"
    if provider == TRITON and key.capability < (8, 0):
        major, minor = key.capability
        return f"it needs compute capability 8.0 or higher, and {key.device} has {major}.{minor}"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
