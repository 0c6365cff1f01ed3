"""The library of CPU kernels: how it is built, what it does without a compiler, what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ao_core import RejectedError, use_provider
from ao_quant import native, native_linear
from ao_quant.float8_ops import FLOAT8, FLOAT8_DYNAMIC_LINEAR, FLOAT8_WEIGHT_LINEAR
from ao_quant.int4_ops import INT4_WEIGHT_LINEAR, INT8_DYNAMIC_INT4_LINEAR
from ao_quant.int8_ops import INT8_DYNAMIC_LINEAR, INT8_WEIGHT_LINEAR
from ao_quant.nf4_ops import NF4_LINEAR

needs_library = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

X = torch.ones(2, 64)
PACKED, INT8 = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 64, dtype=torch.int8)
FLOATS, DOUBLES = torch.ones(4, 2), torch.ones(4, 2, dtype=torch.float64)
BYTES = torch.zeros(4, 2, dtype=torch.uint8)
ONE = torch.ones(4, 1)

MISFITS = [
    (INT8_WEIGHT_LINEAR, (X, INT8, torch.ones(3, 1), None, -1), "scales \\[3, 1\\] do not fit: \\[4, 1\\]"),
    (INT8_WEIGHT_LINEAR, (X, INT8, ONE.double(), None, -1), "scales in float32, not torch.float64"),
    (INT8_WEIGHT_LINEAR, (X, INT8, FLOATS, None, 16), "\\[4, 4\\] is needed"),
    (INT8_WEIGHT_LINEAR, (X, INT8, FLOATS, None, 0), "0 columns"),
    (INT8_WEIGHT_LINEAR, (X, INT8, ONE, torch.ones(3), -1), "a bias \\[3\\]"),
    (INT8_DYNAMIC_LINEAR, (X, INT8, FLOATS, None), "\\[4, 1\\] is needed"),
    (INT4_WEIGHT_LINEAR, (X, PACKED.char(), FLOATS, None, None, 32), "packed codes in uint8"),
    (INT4_WEIGHT_LINEAR, (X, PACKED, DOUBLES, None, None, 32), "float32 or bfloat16, not torch.float64"),
    (INT4_WEIGHT_LINEAR, (X, PACKED, FLOATS, None, None, 16), "\\[4, 4\\] is needed"),
    (INT4_WEIGHT_LINEAR, (X, PACKED, FLOATS, None, None, 0), "0 columns"),
    (INT4_WEIGHT_LINEAR, (X, PACKED, FLOATS, ONE, None, 32), "zero points \\[4, 1\\] do not fit: \\[4, 2\\]"),
    (INT4_WEIGHT_LINEAR, (X, PACKED, FLOATS, DOUBLES, None, 32), "zero points in"),
    (INT4_WEIGHT_LINEAR, (X, PACKED, FLOATS, None, torch.ones(4, 1), 32), "a bias \\[4, 1\\]"),
    (INT8_DYNAMIC_INT4_LINEAR, (X, PACKED, FLOATS.int(), None, 32), "not torch.int32"),
    (NF4_LINEAR, (X, PACKED, BYTES, None, None, None, 32, 256), "scales in float32"),
    (NF4_LINEAR, (X, PACKED, BYTES, ONE, None, None, 32, 256), "steps in float32, not None"),
    (NF4_LINEAR, (X, PACKED, BYTES, ONE, FLOATS, None, 32, 256), "steps \\[4, 2\\] do not fit: \\[4, 1\\]"),
    (NF4_LINEAR, (X, PACKED, BYTES, ONE, ONE, None, 32, 0), "scaler_block_size is 1 or more, not 0"),
    (FLOAT8_WEIGHT_LINEAR, (X, INT8, ONE, None), "float8 codes in float8_e4m3fn"),
    (FLOAT8_WEIGHT_LINEAR, (X, INT8.to(FLOAT8), FLOATS, None), "\\[4, 1\\] is needed"),
    (FLOAT8_DYNAMIC_LINEAR, (X, INT8.to(FLOAT8), torch.ones(3, 1), None, True), "\\[4, 1\\] is needed"),
    (FLOAT8_DYNAMIC_LINEAR, (X.half(), INT8.to(FLOAT8), ONE, None, True), "not torch.float16"),
]


@needs_library
@pytest.mark.parametrize(("op", "args", "says"), MISFITS)
def test_weights_that_do_not_fit_are_rejected(op, args, says):
    """The C code gets bare pointers: what does not fit must not reach it."""
    with use_provider("native"), pytest.raises(RejectedError, match=says):
        op(*args)


@needs_library
@pytest.mark.parametrize("columns", [63, 64])
def test_groups_of_another_input_are_refused(columns):
    """63 columns in groups of 21 are three groups, and 64 are four: only the input tells."""
    groups = {63: 4, 64: 3}[columns]
    with pytest.raises(RuntimeError, match=f"has {groups}: it was quantized for another input size"):
        INT4_WEIGHT_LINEAR(
            torch.ones(2, columns), PACKED, torch.ones(4, groups), None, None, 21, provider="native"
        )


@needs_library
def test_memory_that_is_short_is_an_error(monkeypatch):
    class Library:
        @staticmethod
        def linear(*args):
            return -1

    monkeypatch.setattr(native, "best_unit", lambda: 1)
    monkeypatch.setattr(native, "loaded", Library)
    with pytest.raises(MemoryError, match="no memory"):
        native_linear.linear(native_linear.INT8, X, INT8, ONE, None)


@pytest.mark.parametrize(
    ("compiler", "says"), [("/nowhere/cc", "/nowhere/cc"), ("false", "compiling the native kernels failed")]
)
def test_without_a_compiler_torch_computes(tmp_path, monkeypatch, compiler, says):
    """The reason is kept for ``ao kernels --explain``, and the linear still works."""
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("AO_CACHE_DIR", str(tmp_path))
    program = (
        "import torch, ao_core as ao\n"
        "from ao_quant import native\n"
        "print(native.unavailable())\n"
        "layer = torch.nn.Linear(64, 32)\n"
        "ao.quantize_(layer, 'int8-weight-only')\n"
        "print(layer(torch.ones(2, 64)).isfinite().all().item())\n"
        "print([r.provider for r in ao.explain(ao.OPS.get('int8_weight_linear')) if r.chosen][0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    reason, finite, chosen = done.stdout.splitlines()
    assert says in reason
    assert (finite, chosen) == ("True", "torch")


@needs_library
def test_the_library_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("AO_CACHE_DIR", str(tmp_path))
    program = "from ao_quant import native; assert native.unavailable() is None, native.unavailable()"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], check=True)
    built = list((tmp_path / "native").iterdir())
    assert len(built) == 1
    before = built[0].stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", program], check=True)
    assert built[0].stat().st_mtime_ns == before
