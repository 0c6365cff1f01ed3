"""The library of CPU kernels in C (folder ``native``): compiled once for the processor at hand, and kept.

It is built on first use into the cache directory. Where there is no C compiler, torch computes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).with_name("native")
_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-strict-aliasing", "-funroll-loops",
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math",
)  # fmt: skip
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "linear": [_INT, *[_POINTER] * 8, *[_LONG] * 6, _INT, _INT],
    "dequantize": [_INT, *[_POINTER] * 6, *[_LONG] * 6, _INT],
    "best_unit": [],
}


def unavailable() -> str | None:
    """Why the library can't be used here, or None. The first call compiles it (a few seconds)."""
    library = _library()
    return library if isinstance(library, str) else None


@functools.cache
def loaded() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: there is none, with the reason.
    """
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@functools.cache
def best_unit() -> int:
    """What the processor has for many rows: 0 nothing special, 1 vectors of 16 floats, 2 a matrix unit."""
    return int(loaded().best_unit())


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if sys.platform != "linux":
        return f"the native kernels are built on Linux, not on {sys.platform}"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler: install gcc, or set CC"
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"compiling the native kernels failed: {detail.strip().splitlines()[-1]}"
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _INT
    return library


def _built(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    sources = [path.read_text(encoding="utf-8") for path in sorted(_SOURCES.glob("*.[ch]"))]
    parts = [*sources, version, " ".join(_FLAGS), _processor()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("AO_CACHE_DIR") or user_cache_path("ao")) / "native"
    target = folder / f"linears-{digest}.so"
    if not target.exists():
        logger.info("compiling %s with %s", _SOURCES, compiler)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            command = [compiler, *_FLAGS, "-o", str(built), str(_SOURCES / "native.c")]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(target)
    return target


def _processor() -> str:
    """What ``-march=native`` depends on: a cache directory may be shared by unlike machines."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    lines = {line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))}
    return "\n".join(sorted(lines))
