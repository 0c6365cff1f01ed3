"""Activations in 8 bits: codes as the references have them, products against float64 of the same codes."""

from __future__ import annotations

import pytest
import torch
from kernel_weights import LEAST

import ao_core as ao
from ao_core.numerics import pack
from ao_core.testing.kernels import poisoned_memory
from ao_kernels import int4_linear, int8_mm
from ao_kernels.configs import Gemm
from ao_kernels.rows import rounded_tokens
from ao_quant.int4_ops import quantize_token

FLOAT8 = torch.float8_e4m3fn


def random_rows(m, k, dtype=torch.bfloat16):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)
    if m > 4:  # zeros, one large value, small ones, all of one sign
        x[1], x[2, 0], x[3], x[4] = 0, 3e4, x[3] * 1e-4, x[4].abs() + 1
    return x


@pytest.mark.parametrize("k", [1, 17, 576, 9000])
def test_float8_rows_are_the_references(k, device):
    from ao_quant.float8_ops import quantize_float8

    x = random_rows(5, k)
    codes, scale = int8_mm.quantize_rows(x.to(device), FLOAT8)
    expected, expected_scale = quantize_float8(x, rowwise=True)
    assert torch.equal(scale.cpu(), expected_scale.flatten())
    assert torch.equal(codes.cpu().float(), expected.float())


@pytest.mark.parametrize("k", [1, 17, 576, 9000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_tokens_are_what_the_references_codes_stand_for(k, dtype, device):
    x = random_rows(5, k, dtype)
    found = rounded_tokens(x.to(device))
    steps, scale = quantize_token(x)
    assert (found.dtype, found.shape, found.stride(0) * 2 % 16) == (dtype, x.shape, 0)
    last_bit = (
        2.0**-11 if dtype == torch.float16 else 2.0**-8 if found.is_cuda else 2.0**-7
    )  # interpreted: cut
    assert torch.allclose(found.cpu().float(), steps * scale, rtol=last_bit, atol=2.0**-25)
    assert not found.cpu()[steps == 0].any()


def test_rows_that_are_not_finite_stay_so(device):
    x = torch.ones(3, 64, dtype=torch.bfloat16)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    packed = torch.full((8, 32), 0x31, dtype=torch.uint8)
    ones = torch.ones(8, 1)
    found = int4_linear.dynamic_linear(x.to(device), packed.to(device), ones.to(device), None, -1)
    assert found.isfinite().all(1).tolist() == [False, False, True]
    codes = torch.ones(8, 64).to(FLOAT8)
    found = int8_mm.dynamic_linear(x.to(device), codes.to(device), ones.to(device), None)
    assert found.isfinite().all(1).tolist() == [False, False, True]


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_4_bit_weights_against_float64(group_size, device):
    for index, (m, n, k) in enumerate(((1, 20, 63), (17, 33, 100), (20, 1, 257), (5, 9, 576))):
        dtype = (torch.bfloat16, torch.float16)[index % 2]
        generator = torch.Generator().manual_seed(n)
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        size = k if group_size < 0 else group_size
        scale = torch.rand(n, -(-k // size), generator=generator) / 10 + 0.01
        scale = scale.bfloat16() if index % 2 else scale
        bias = torch.randn(n, generator=generator) if index % 2 == 0 else None
        x = random_rows(m, 2 * k, dtype)[:, ::2]
        packed = pack.pack(codes, bits=4).to(device)
        with poisoned_memory():
            moved = None if bias is None else bias.to(device)
            found = int4_linear.dynamic_linear(x.to(device), packed, scale.to(device), moved, group_size)
        steps, x_scale = quantize_token(x)
        values = (codes.double() - 8) * scale.double()[:, torch.arange(k) // size]
        expected = steps.double() * x_scale.double() @ values.t()
        expected += 0 if bias is None else bias.double()
        assert found.dtype == dtype
        assert ao.sqnr(expected, found.cpu()) > LEAST[dtype], (m, n, k)


def test_rounding_to_bfloat16_makes_a_quarter_of_the_error_of_quantizing():
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    steps, scale = quantize_token(x)
    exact = steps.double() * scale.double()
    added = (exact.bfloat16().double() - exact).norm()
    assert 0 < added < (exact - x.double()).norm() / 4


needs_float8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no float8 products"
)
GEMMS = (
    None,
    Gemm("pointers", 16, 32, 64, 4, 3, 0, 1),
    Gemm("pointers", 32, 16, 256, 4, 3, 0, 2),
    Gemm("copy engine", 64, 64, 128, 4, 3, 2, 8),
)


@needs_float8
@pytest.mark.parametrize("config", GEMMS, ids=repr)
def test_float8_against_float64(config, device):
    for index, (m, n, k) in enumerate(((1, 17, 63), (66, 33, 256), (17, 1, 1), (40, 64, 528))):
        dtype = (torch.bfloat16, torch.float16)[index % 2]
        generator = torch.Generator().manual_seed(n)
        codes = (torch.randn(n, k, generator=generator) * 100).clamp(-448, 448).to(FLOAT8)
        scale = torch.rand(n, 1, generator=generator) / 100 + 1e-3
        bias = torch.randn(n, generator=generator) if index % 2 == 0 else None
        x = random_rows(m, k, dtype)
        with poisoned_memory():
            moved = None if bias is None else bias.to(device)
            found = int8_mm.dynamic_linear(x.to(device), codes.to(device), scale.to(device), moved, config)
        x_codes, x_scale = (each.cpu() for each in int8_mm.quantize_rows(x.to(device), FLOAT8))
        expected = (x_codes.double() * x_scale.double()[:, None]) @ (codes.double() * scale.double()).t()
        expected += 0 if bias is None else bias.double()
        assert ao.sqnr(expected, found.cpu()) > LEAST[dtype], (m, n, k)


def test_what_is_not_taken_is_said(device):
    op = ao.OPS.get("float8_dynamic_linear")
    rows = {row.provider: row for row in ao.explain(op, device) if ", bfloat16" in row.key and row.reason}
    provider = "triton" if device.type == "cuda" else "triton_interpreted"
    assert "one scale for all was asked for" in rows[provider].reason
    x, packed = torch.zeros(2, 66, dtype=torch.float16, device=device), torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="63 or 64 input features"):
        int4_linear.dynamic_linear(x, packed.to(device), torch.ones(4, 1, device=device), None, -1)
