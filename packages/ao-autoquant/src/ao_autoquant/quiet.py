"""Keeping what HiGHS prints by mistake off the standard output, which may be JSON."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_MISTAKE = b"HighsMipSolverData::"  # a line for each repaired solution: scipy 1.17, whatever "disp" says


@contextmanager
def without_mistakes() -> Iterator[None]:
    """What the block prints, from C++ too, comes out at its end without those lines. Only on POSIX."""
    try:
        real = os.dup(1) if os.name == "posix" else None
    except OSError:  # there is no standard output to keep clean
        real = None
    if real is None:
        yield
        return
    with tempfile.TemporaryFile() as held:
        try:
            _flush()
            os.dup2(held.fileno(), 1)
            yield
        finally:
            _flush()
            os.dup2(real, 1)
            os.close(real)
            held.seek(0)
            for line in held:
                if not line.startswith(_MISTAKE):
                    os.write(1, line)


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)
