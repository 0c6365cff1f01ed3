"""CPU kernels in C (native.c), compiled once for the processor at hand and kept in the cache directory.

torch's own kernels lose to the float linear in places: its int8 kernel from about 8 rows on, and
dequantizing by torch ops costs more than the multiplication. These do not. Where there is no C compiler
the kernels of :mod:`ao_quant.int8_ops` run.
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

import torch
import torch.nn.functional as F
from platformdirs import user_cache_path

from ao_core import Kernel, Key
from ao_quant.int8_ops import check_input, dynamic_linear_torch

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-strict-aliasing", "-funroll-loops",
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math",
)  # fmt: skip
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_DEQUANTIZE = [_POINTER] * 3 + [_LONG] * 4 + [_INT]
_SIGNATURES = {
    "dequantize_bfloat16": (_DEQUANTIZE, None),
    "dequantize_float32": (_DEQUANTIZE, None),
    "few_rows": ([_POINTER] * 5 + [_INT] + [_LONG] * 5 + [_INT], _INT),
    "many_rows": ([_POINTER] * 5 + [_LONG] * 4 + [_POINTER, _INT], None),
    "quantize_rows": ([_POINTER, _INT] + [_POINTER] * 2 + [_LONG] * 2 + [_INT], _INT),
    "few_rows_int8": ([_POINTER] * 6 + [_INT] + [_LONG] * 3 + [_INT], None),
    "many_rows_int8": ([_POINTER] * 6 + [_INT] + [_LONG] * 3 + [_POINTER, _INT], None),
    "has_matrix_unit": ([], _INT),
    "scratch_size": ([_LONG, _INT], _LONG),
}
# Up to so many rows dot products win. 2 threads of a CPU with AMX, SmolLM2's shapes: in bfloat16 they take
# 0.7 of the matrix unit's time at 4 rows and as much at 8; in float32 as much at 16.
_FEW = {torch.bfloat16: 4, torch.float32: 8}
_FEW_INT8 = 1
_ROWS_AT_ONCE = 576  # weight rows dequantized at a time: they stay in the cache, and no large copy is made


def weight_linear_native(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """``int8_weight_linear``: dot products for few rows, the matrix unit or a float matmul above."""
    n, k = codes.shape
    check_input(x, codes)
    x, codes, scale = x.contiguous(), codes.contiguous(), scale.contiguous()
    out = x.new_empty(*x.shape[:-1], n)
    rows = x.numel() // k
    if 0 < rows <= _FEW[x.dtype]:
        _few_rows(x, codes, scale, bias, out, group_size)
    elif rows:
        flat, flat_out = x.view(rows, k), out.view(rows, n)
        if scale.shape[1] == 1 and _matrix_unit_takes(n, k):
            _many_rows(flat, codes, scale, bias, flat_out)
        else:
            _dequantized(flat, codes, scale, bias, flat_out, group_size)
    return out


def dynamic_linear_native(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``int8_dynamic_linear``: activations quantized in one pass, then the matrix unit or dot products."""
    n, k = codes.shape
    check_input(x, codes)
    x, codes, scale = x.contiguous(), codes.contiguous(), scale.contiguous()
    out = x.new_empty(*x.shape[:-1], n)
    if (rows := x.numel() // k) == 0:
        return out
    matrix_unit = rows > _FEW_INT8 and n % 32 == 0 and k % 64 == 0 and _matrix_unit()
    if rows > _FEW_INT8 and not matrix_unit:
        return dynamic_linear_torch(x, codes, scale, bias)
    padded = rows + -rows % 16 if matrix_unit else rows
    half = x.dtype == torch.bfloat16
    xq = torch.empty(padded, k, dtype=torch.int8)
    x_scale = torch.empty(rows)
    _call("quantize_rows", x, half, xq, x_scale, rows, k)
    wide = None if bias is None else bias.float()
    if matrix_unit:
        scratch = torch.empty(_loaded().scratch_size(k, torch.get_num_threads()), dtype=torch.int8)
        _call("many_rows_int8", xq, x_scale, codes, scale, wide, out, half, rows, n, k, scratch)
    else:
        _call("few_rows_int8", xq, x_scale, codes, scale, wide, out, half, rows, n, k)
    return out


def unavailable() -> str | None:
    """Why the library can't be used here, or None. The first call compiles it (a second or two)."""
    library = _library()
    return library if isinstance(library, str) else None


def _few_rows(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    group_size: int,
) -> None:
    (n, k), groups = codes.shape, scale.shape[1]
    wide = None if bias is None else bias.float()
    size = k if group_size < 0 else group_size
    # Written out, not by _call: at one row, a microsecond here is 2% of a layer of SmolLM2.
    failed = _loaded().few_rows(
        x.data_ptr(), codes.data_ptr(), scale.data_ptr(), None if wide is None else wide.data_ptr(),
        out.data_ptr(), x.dtype == torch.bfloat16, x.numel() // k, n, k, groups, size,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise _out_of_memory("few_rows")


def _many_rows(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    (n, k), m = codes.shape, x.shape[0]
    padded = F.pad(x, (0, 0, 0, -m % 16)) if m % 16 else x
    parts = padded if x.dtype == torch.bfloat16 else _three_parts(padded)
    wide = None if bias is None else bias.float()
    size = _loaded().scratch_size(k, torch.get_num_threads())
    scratch = torch.empty(size + 32, dtype=torch.bfloat16)
    scratch = scratch[-scratch.data_ptr() % 64 // 2 :]  # at a multiple of 64 bytes
    _call("many_rows", parts, codes, scale, wide, out, len(parts) if parts.ndim == 3 else 1, m, n, k, scratch)


def _three_parts(x: torch.Tensor) -> torch.Tensor:
    """Three bfloat16 ``[3, M, K]`` whose sum is the float32 ``x`` ``[M, K]``, to its last bit.

    An infinite value gives NaN, so its row of the result is NaN where a float matmul has infinity.
    """
    high = x.bfloat16()
    rest = x - high
    middle = rest.bfloat16()
    return torch.stack((high, middle, (rest - middle).bfloat16()))


def _dequantized(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    group_size: int,
) -> None:
    (n, k), groups = codes.shape, scale.shape[1]
    name = "dequantize_bfloat16" if x.dtype == torch.bfloat16 else "dequantize_float32"
    weight = x.new_empty(min(_ROWS_AT_ONCE, n), k)
    size = k if group_size < 0 else group_size
    for start in range(0, n, _ROWS_AT_ONCE):
        stop = start + _ROWS_AT_ONCE
        part, part_scale = codes[start:stop], scale[start:stop]
        _call(name, part, part_scale, weight, len(part), k, groups, size)
        torch.mm(x, weight[: len(part)].t(), out=out[:, start:stop])
    if bias is not None:
        out += bias


def _call(name: str, *args: torch.Tensor | int | None) -> None:
    values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
    if getattr(_loaded(), name)(*values, torch.get_num_threads()):
        raise _out_of_memory(name)


def _out_of_memory(name: str) -> MemoryError:
    return MemoryError(f"native kernel {name} found no memory for a copy of the activations")


def _matrix_unit_takes(n: int, k: int) -> bool:
    return n % 32 == 0 and k % 32 == 0 and _matrix_unit()


@functools.cache
def _matrix_unit() -> bool:
    return bool(_loaded().has_matrix_unit())


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


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
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def _built(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    parts = [_SOURCE.read_text(encoding="utf-8"), version, " ".join(_FLAGS), _processor()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("AO_CACHE_DIR") or user_cache_path("ao")) / "native"
    target = folder / f"int8-{digest}.so"
    if not target.exists():
        logger.info("compiling %s with %s", _SOURCE.name, compiler)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            command = [compiler, *_FLAGS, "-o", str(built), str(_SOURCE)]
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


def _rejects(key: Key) -> str | None:
    if key.device.type != "cpu":
        return f"it runs on cpu, not on {key.device.type}"
    if key.dtype not in (torch.bfloat16, torch.float32):
        return f"it takes bfloat16 and float32 activations, not {key.dtype}"
    return _misfit(key) or unavailable()


def _misfit(key: Key) -> str | None:
    """Why the weights are not what the C code reads, which gets bare pointers."""
    codes, scale, bias = (*key.weights, None)[:3]
    if codes is None or scale is None or codes[1] != torch.int8 or scale[1] != torch.float32:
        return "it takes int8 codes and float32 scales"
    (codes_shape, _), (scale_shape, _) = codes, scale
    if len(codes_shape) != 2 or len(scale_shape) != 2 or scale_shape[0] != codes_shape[0]:
        return f"codes [N, K] and scales [N, G] do not fit: {list(codes_shape)} and {list(scale_shape)}"
    k, size = codes_shape[1], key.options[0] if key.options else -1
    groups = 1 if size < 0 or k == 0 else -(-k // max(size, 1))
    if k == 0 or scale_shape[1] != groups:
        return f"{k} columns in groups of {size} need {groups} scales a row, and there are {scale_shape[1]}"
    if bias is not None and bias[0] != codes_shape[:1]:
        return f"a bias {list(bias[0])} does not fit {codes_shape[0]} rows"
    return None


KERNELS = [
    Kernel("int8_weight_linear", "native", weight_linear_native, priority=10, rejects=_rejects),
    Kernel("int8_dynamic_linear", "native", dynamic_linear_native, priority=10, rejects=_rejects),
]
