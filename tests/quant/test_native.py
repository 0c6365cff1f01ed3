"""The CPU kernels in C: every path against float64, and what happens without a compiler."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from ao_core import RejectedError, use_provider
from ao_core.testing import poisoned_memory
from ao_quant import native
from ao_quant.int8_ops import INT8_WEIGHT_LINEAR, dynamic_linear_reference

needs_library = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def call(rows, n, k, dtype, group_size=-1, bias=True):
    generator = torch.Generator().manual_seed(rows + n + k)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    groups = 1 if group_size < 0 else -(-k // group_size)
    scale = (torch.rand(n, groups, generator=generator) + 0.1).bfloat16().float()
    added = torch.randn(n, generator=generator).to(dtype) * 50 if bias else None
    with poisoned_memory():
        out = native.weight_linear_native(x, codes, scale, added, group_size)
    size = k if group_size < 0 else group_size
    weight = codes.double() * scale.double().repeat_interleave(size, 1)[:, :k]
    expected = x.double() @ weight.t() + (0 if added is None else added.double())
    return out, expected


@needs_library
@pytest.mark.parametrize("matrix_unit", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_path_equals_float64(dtype, matrix_unit, monkeypatch):
    """Row counts at and beside each switch; sizes that the matrix unit takes, and that it does not."""
    if not matrix_unit:
        monkeypatch.setattr(native, "_matrix_unit", lambda: False)
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    for rows, n, k in itertools.product((1, 3, 4, 5, 9, 16, 17, 33, 64), (32, 96, 17, 600), (32, 576, 100)):
        out, expected = call(rows, n, k, dtype, bias=rows % 2 == 1)
        assert out.shape == (rows, n)
        assert out.dtype == dtype
        error = (out.double() - expected).norm() / expected.norm()
        assert error < tolerance, (rows, n, k, float(error))


@needs_library
@pytest.mark.parametrize("group_size", [1, 32, 100, 4096])
def test_groups(group_size):
    for rows in (1, 4, 40):
        out, expected = call(rows, 33, 576, torch.float32, group_size)
        assert (out.double() - expected).norm() / expected.norm() < 1e-6


@needs_library
def test_float32_keeps_its_last_bit_on_the_matrix_unit():
    """Three bfloat16 parts add up to the float32 exactly."""
    x = torch.randn(64, 96) * torch.logspace(-6, 6, 96)
    parts = native._three_parts(x)
    assert torch.equal(parts.double().sum(0), x.double())


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dynamic_equals_its_reference(dtype):
    """One row, and row counts beside the matrix unit's tiles."""
    for rows, n, k in itertools.product((1, 2, 16, 17, 33), (32, 96, 17), (64, 576, 100)):
        x = torch.randn(rows, k).to(dtype)
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        scale, bias = torch.rand(n, 1) + 0.1, (torch.randn(n) * 50).to(dtype)
        with poisoned_memory():
            out = native.dynamic_linear_native(x, codes, scale, bias)
        expected = dynamic_linear_reference(x, codes, scale, bias).double()
        error = (out.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 3e-3), (rows, n, k, float(error))


@needs_library
@pytest.mark.parametrize(
    ("scale", "bias", "group_size", "says"),
    [
        (torch.ones(3, 1), None, -1, "do not fit"),
        (torch.ones(4, 1, dtype=torch.float64), None, -1, "float32 scales"),
        (torch.ones(4, 2), None, 16, "need 4 scales a row"),
        (torch.ones(4, 1), torch.ones(3), -1, "bias"),
    ],
)
def test_weights_that_do_not_fit_are_rejected(scale, bias, group_size, says):
    """The C code gets bare pointers: what does not fit must not reach it."""
    codes = torch.ones(4, 64, dtype=torch.int8)
    with use_provider("native"), pytest.raises(RejectedError, match=says):
        INT8_WEIGHT_LINEAR(torch.ones(2, 64), codes, scale, bias, group_size)


@needs_library
def test_nan_stays_nan():
    for rows in (2, 40):
        x = torch.ones(rows, 64, dtype=torch.bfloat16)
        x[1, 3] = torch.nan
        out = native.weight_linear_native(
            x, torch.ones(32, 64, dtype=torch.int8), torch.ones(32, 1), None, -1
        )
        assert out[1].isnan().all()
        assert out[0].isfinite().all()


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
