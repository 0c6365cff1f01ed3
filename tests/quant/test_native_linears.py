"""Every path of the native linears against float64, also as older and other processors run them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from ao_core.numerics import pack
from ao_core.testing import poisoned_memory
from ao_quant import native
from ao_quant.float8_native import dynamic_linear_native as float8_dynamic
from ao_quant.float8_native import weight_linear_native as float8_linear
from ao_quant.float8_ops import FLOAT8
from ao_quant.float8_ops import dynamic_linear_reference as float8_dynamic_reference
from ao_quant.int4_ops import dynamic_linear_reference as int4_dynamic_reference
from ao_quant.int8_native import dynamic_linear_native as int8_dynamic
from ao_quant.int8_native import weight_linear_native as int8_linear
from ao_quant.int8_ops import dynamic_linear_reference as int8_dynamic_reference
from ao_quant.nf4_ops import NF4_LEVELS
from ao_quant.nibble_native import dynamic_linear_native as int4_dynamic
from ao_quant.nibble_native import int4_linear_native, nf4_linear_native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
EMULATED = Path(__file__).with_name("emulated_matrix_unit.h")
# What is compiled in, what the processor must have for it, and the best unit of it.
PROCESSORS = {
    "this": ((), "", None),
    "x86-64": (("-march=x86-64",), " sse2 ", 0),
    "avx2": (("-march=haswell",), " avx2 ", 0),
    "avx512": (("-march=skylake-avx512",), " avx512bw ", 1),
    "no-openmp": (("-fno-openmp",), "", None),
    "matrix-unit": (("-include", str(EMULATED)), " avx512_bf16 ", 2),
}
ROWS = (1, 2, 3, 5, 8, 9, 17, 48)
# N, K and columns to a group, -1 for all: vectors, pieces of them and more than the cache's blocks.
SIZES = ((96, 608, 32), (33, 576, 64), (17, 100, -1), (51, 2100, 100), (51, 2100, 256), (3, 1, -1))


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch, tmp_path_factory):
    """The library as it is compiled for this processor, or for less or more than it has."""
    flags, needs, unit = PROCESSORS[request.param]
    if needs not in FLAGS:
        pytest.skip(f"this processor has no{needs}")
    if flags:
        cache = tmp_path_factory.getbasetemp() / "libraries"  # one build serves all tests
        monkeypatch.setenv("AO_CACHE_DIR", str(cache))
        monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, *flags))
    for cached in (native._library, native.loaded, native.best_unit):
        cached.cache_clear()
    assert native.unavailable() is None
    if unit is not None:
        monkeypatch.setattr(native, "best_unit", lambda: unit)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that share a core wait for one another: a hundred times slower
    yield request.param
    torch.set_num_threads(threads)
    monkeypatch.undo()
    for cached in (native._library, native.loaded, native.best_unit):
        cached.cache_clear()


def inputs(rows, n, k, dtype):
    generator = torch.Generator().manual_seed(rows + n + k)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) * 10 if rows % 2 else None
    return x, bias, generator


def expand(values, size, k):
    return values.double().repeat_interleave(k if size < 0 else size, 1)[:, :k]


def close(found, x, weight, bias):
    """Within float32's rounding, or bfloat16's of weights and result; sums of a few terms may cancel."""
    expected = x.double() @ weight.t() + (0 if bias is None else bias.double())
    assert found.dtype == x.dtype
    terms = (x.double() ** 2 @ (weight.t() ** 2)).sqrt().norm() + expected.norm()
    error = (found.double() - expected).norm() / terms
    return error < (1e-6 if x.dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zeros", ["none", "bfloat16", "float32", "uint8"])
def test_int4(processor, dtype, zeros):
    """Row counts at and beside each switch; groups that vectors take, and that they do not."""
    for rows, (n, k, size) in itertools.product(ROWS, SIZES):
        x, bias, generator = inputs(rows, n, k, dtype)
        groups = 1 if size < 0 else -(-k // size)
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(n, groups, generator=generator) + 0.1).to(
            torch.bfloat16 if rows % 2 else torch.float32
        )
        zero = {
            "none": None,
            "bfloat16": torch.randn(n, groups, generator=generator).bfloat16(),
            "float32": torch.randn(n, groups, generator=generator),
            "uint8": torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8),
        }[zeros]
        steps = codes.double() - (expand(zero, size, k) if zeros == "uint8" else 8)
        weight = steps * expand(scale, size, k)
        if zeros in ("bfloat16", "float32"):
            weight += expand(zero, size, k)
        with poisoned_memory():
            out = int4_linear_native(x, pack.pack(codes, bits=4), scale, zero, bias, size)
        assert close(out, x, weight, bias), (rows, n, k, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scaler", [0, 3, 16, 256])
def test_nf4(processor, dtype, scaler):
    """With float32 absmax, and with bytes on grids that share a part of a vector, one, or the row."""
    for rows, (n, k, columns) in itertools.product(ROWS, SIZES):
        x, bias, generator = inputs(rows, n, k, dtype)
        size = k if columns < 0 else columns
        blocks = -(-k // size)
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        absmax, offset, step = torch.rand(n, blocks, generator=generator) + 0.1, None, None
        if scaler:
            shape = (n, -(-blocks // scaler))
            offset = torch.rand(shape, generator=generator) + 0.1
            step = torch.rand(shape, generator=generator) / 500
            stored = torch.randint(0, 256, (n, blocks), generator=generator, dtype=torch.uint8)
            root = expand(offset, scaler, blocks) + stored * expand(step, scaler, blocks)
            absmax = root**4
        weight = torch.tensor(NF4_LEVELS).double()[codes.long()] * expand(absmax, size, k)
        args = (stored if scaler else absmax, offset, step, bias, size, scaler)
        with poisoned_memory():
            out = nf4_linear_native(x, pack.pack(codes, bits=4), *args)
        assert close(out, x, weight, bias), (rows, n, k, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8(processor, dtype):
    for rows, (n, k, size) in itertools.product(ROWS, SIZES):
        x, bias, generator = inputs(rows, n, k, dtype)
        codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        scale = torch.rand(n, 1 if size < 0 else -(-k // size), generator=generator) + 0.1
        with poisoned_memory():
            out = int8_linear(x, codes, scale, bias, size)
        assert close(out, x, codes.double() * expand(scale, size, k), bias), (rows, n, k, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("one", [True, False])
def test_float8(processor, dtype, one):
    for rows, (n, k, _) in itertools.product(ROWS, SIZES):
        x, bias, generator = inputs(rows, n, k, dtype)
        codes = (torch.randn(n, k, generator=generator) * 50).clamp(-448, 448).to(FLOAT8)
        scale = torch.rand(1 if one else n, 1, generator=generator) + 0.1
        with poisoned_memory():
            out = float8_linear(x, codes, scale, bias)
        assert close(out, x, codes.double() * scale.double(), bias), (rows, n, k)


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_float8_is_read_right(processor, dtype, rows):
    """All 256 codes, each in a weight row of its own, NaN and subnormal numbers too."""
    codes = torch.arange(256, dtype=torch.uint8).view(FLOAT8)[:, None].expand(256, 32).contiguous()
    x = torch.zeros(rows, 32, dtype=dtype)
    x[:, 0] = torch.arange(1, rows + 1)
    out = float8_linear(x, codes, torch.ones(256, 1), None)
    expected = (x[:, :1].float() * codes[:, 0].float()).to(dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", ["int8", "int4", "float8-rows", "float8-one"])
def test_quantized_activations_are_those_of_the_reference(processor, dtype, scheme):
    """Rows far from zero, of one sign, of zeros: not a code may differ."""
    for rows, (n, k, columns) in itertools.product(ROWS, SIZES):
        size = columns if scheme == "int4" else -1
        x, bias, generator = inputs(rows, n, k, dtype)
        x += torch.linspace(-2, 5, rows)[:, None].to(dtype)
        x[rows // 2] = 0
        scale = torch.rand(n, 1 if size < 0 else -(-k // size), generator=generator) + 0.1
        nibbles = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        kernel, reference, args = {
            "int8": (int8_dynamic, int8_dynamic_reference, (codes, scale, bias)),
            "int4": (
                int4_dynamic,
                int4_dynamic_reference,
                (pack.pack(nibbles, bits=4), scale.bfloat16(), bias, size),
            ),
            "float8-rows": (float8_dynamic, float8_dynamic_reference, (codes.to(FLOAT8), scale, bias, True)),
            "float8-one": (float8_dynamic, float8_dynamic_reference, (codes.to(FLOAT8), scale, bias, False)),
        }[scheme]
        with poisoned_memory():
            out = kernel(x, *args)
        expected = reference(x.float(), *args)
        error = (out.double() - expected.double()).norm() / expected.double().norm()
        assert out.dtype == dtype
        assert error < (1e-6 if dtype == torch.float32 else 6e-3), (rows, n, k, size, float(error))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [2, 40])
def test_what_is_not_finite_shows_in_its_row_alone(processor, rows, bad):
    x = torch.ones(rows, 64, dtype=torch.bfloat16)
    x[1, 3] = bad
    int8, float8 = torch.ones(32, 64, dtype=torch.int8), torch.ones(32, 64).to(FLOAT8)
    packed, scale = torch.full((32, 32), 0x99, dtype=torch.uint8), torch.ones(32, 1)
    outs = [
        int8_linear(x, int8, scale, None, -1),
        int8_dynamic(x, int8, scale, None),
        int4_linear_native(x, packed, scale, None, None, -1),
        int4_dynamic(x, packed, scale, None, -1),
        float8_linear(x, float8, scale, None),
        float8_dynamic(x, float8, scale, None, True),  # noqa: FBT003
    ]
    for out in outs:
        assert not out[1].isfinite().any()
        assert out[0].isfinite().all()
        assert out[2:].isfinite().all()


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_threads_share_the_work(processor, rows):
    """A result does not depend on their number, also where there are more than blocks of weight rows."""
    packed, scale = torch.randint(0, 256, (100, 288), dtype=torch.uint8), torch.rand(100, 9)
    x = torch.randn(rows, 576)
    kernels = (
        lambda: int4_linear_native(x, packed, scale, scale, None, 64),
        lambda: int4_dynamic(x, packed, scale, None, 64),
    )
    for kernel in kernels:
        torch.set_num_threads(1)
        expected = kernel()
        for threads in (2, 3, 9):
            torch.set_num_threads(threads)
            with poisoned_memory():
                found = kernel()
            assert (found - expected).norm() / expected.norm() < 1e-6


def test_other_threads_may_call_at_the_same_time(processor):
    """The library keeps nothing between calls."""
    from concurrent.futures import ThreadPoolExecutor

    packed, scale = torch.randint(0, 256, (96, 288), dtype=torch.uint8), torch.rand(96, 9)
    x = [torch.randn(rows, 576) for rows in (1, 7, 40) * 8]

    def run(each):
        return int4_linear_native(each, packed, scale, None, None, 64)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, x))
    assert all(torch.equal(found, run(each)) for found, each in zip(together, x, strict=True))
