"""Offsets beyond 32 bits: on a CPU in rows far apart, nothing between them; on a GPU in large tensors."""

from __future__ import annotations

import pytest
import torch

import ao_core as ao
from ao_core.numerics import affine
from ao_kernels import experts_linear, int4_linear, int8_mm, nf4_linear
from ao_kernels.configs import Decoded, Few, Gemm, Many, Parts, Registers, Specialized
from ao_kernels.rows import rounded_tokens
from ao_kernels.support import hopper
from ao_kernels.weight_linear import Codes, weight_linear

FAR = 2**30 + 16  # the third row starts beyond what 32 bits count
ROWS, COLUMNS = 2**19 + 3, 4096  # together more elements than that
LEAST = 38


def apart(values):
    """``values`` ``[3, K]`` in rows ``FAR`` elements apart; nothing between them is read or written."""
    memory = torch.empty(2 * FAR + values.shape[1], dtype=values.dtype)
    rows = memory.as_strided(values.shape, (FAR, 1))
    return rows.copy_(values)


def whole(m, k, dtype=torch.int8, generator=None):
    return torch.randint(-8, 8, (m, k), generator=generator, dtype=torch.int8).to(dtype)


not_interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="interpreted; GPUs have the tests below"
)


@not_interpreted
@pytest.mark.parametrize("config", [Few(2, 16, 2, 2, 64, 3), Many(32, 16, 4, 32, 3, 1)], ids=repr)
def test_rows_of_activations_and_codes_far_apart(config):
    x, codes = apart(whole(3, 64, torch.float16)), apart(whole(3, 64))
    found = weight_linear(x, Codes("int8", codes, torch.ones(3, 1)), None, config)
    assert torch.equal(found.double(), x.double() @ codes.double().t())


@not_interpreted
def test_products_of_rows_far_apart():
    x, codes = apart(whole(3, 64)), apart(whole(3, 64))
    found = int8_mm.scaled_mm(x, codes, None, None, None, torch.int32)
    assert torch.equal(found.long(), x.long() @ codes.long().t())
    packed = apart(whole(3, 32).view(torch.uint8))
    floats = apart(whole(3, 64, torch.float16))
    near = int4_linear.dynamic_linear(floats.clone(), packed.clone(), torch.ones(3, 1), None, -1)
    assert torch.equal(int4_linear.dynamic_linear(floats, packed, torch.ones(3, 1), None, -1), near)


@not_interpreted
def test_quantizing_rows_far_apart():
    x = apart(torch.randn(3, 64).half())
    codes, scale = int8_mm.quantize_rows(x)
    expected, expected_scale = affine.quantize_per_token(x)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale.flatten())


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 20 GB")
CONFIGS = [
    Few(1, 16, 16, 2, 64, 3),
    Many(64, 128, 4, 64, 3, 1),
    Specialized(128, 128, 64, 3, 2, 1, 1),
    Registers(128, 6, 3, 1, 1),
    Parts(4, 32, 32, 64, 3),
    Decoded(),
]
OF_HOPPER = (Specialized, Registers, Parts)


def last(tensor, rows=3):
    return tensor[-rows:].cpu().double()


def runs(config, device):
    return not isinstance(config, OF_HOPPER) or hopper(device)


@on_gpu
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_many_activations(kind, config, device):
    """M * K beyond 2 ** 31: the last rows are right."""
    if not runs(config, torch.device("cuda:0")):
        pytest.skip("for Hopper")
    generator = torch.Generator().manual_seed(0)
    width = COLUMNS // 2 if kind == "int4" else COLUMNS
    x = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
    x[-3:] = torch.randn(3, COLUMNS, generator=generator).to(device)
    codes = torch.randint(0, 127, (16, width), generator=generator, dtype=torch.uint8)
    codes = codes if kind == "int4" else codes.view(torch.int8)
    scale = torch.ones(16, 1)
    found = weight_linear(x, Codes(kind, codes.to(device), scale.to(device)), None, config)
    values = codes.double()
    if kind == "int4":
        values = torch.stack((codes & 15, codes >> 4), -1).flatten(1).double() - 8
    assert ao.sqnr(last(x) @ values.t(), last(found)) > LEAST
    assert not found[:-3].any()


@on_gpu
@pytest.mark.parametrize("m", [1, 16, 64, 100])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_many_codes(m, config, device):
    """N * K beyond 2 ** 31."""
    if not runs(config, torch.device("cuda:0")):
        pytest.skip("for Hopper")
    x = torch.randn(m, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    codes = torch.zeros(ROWS, COLUMNS, dtype=torch.int8, device=device)
    codes[-3:] = whole(3, COLUMNS).to(device)
    weight = Codes("int8", codes, torch.ones(ROWS, 1, device=device))
    found = weight_linear(x, weight, None, config)
    assert ao.sqnr(x.cpu().double() @ last(codes).t(), found[:, -3:].cpu()) > LEAST


@on_gpu
@pytest.mark.parametrize("config", [each for each in CONFIGS if not isinstance(each, OF_HOPPER)], ids=repr)
def test_many_experts(config, device):
    """E * N * K beyond 2 ** 31: the last rows of the last expert are right."""
    experts, n = 9, 2**16 + 8
    x = torch.randn(20, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    codes = torch.zeros(experts * n, COLUMNS, dtype=torch.int8, device=device)
    codes[-3:] = whole(3, COLUMNS).to(device)
    weight = Codes("int8", codes, torch.ones(experts * n, 1, device=device))
    offsets = torch.tensor([0, 3, *[3] * (experts - 3), 18], device=device)
    found = experts_linear.experts_linear(x, offsets, weight, experts, config)
    expected = x[3:18].cpu().double() @ last(codes).t()
    assert ao.sqnr(expected, found[3:18, -3:].cpu()) > LEAST
    assert not found[18:].any()


@on_gpu
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_large_output(config, device):
    """M * N beyond 2 ** 31."""
    if not runs(config, torch.device("cuda:0")):
        pytest.skip("for Hopper")
    m, n, k = 2**16 + 3, 2**15 + 5, 64
    x, codes = whole(m, k, torch.bfloat16).to(device), whole(n, k).to(device)
    found = weight_linear(x, Codes("int8", codes, torch.ones(n, 1, device=device)), None, config)
    assert ao.sqnr(last(x) @ codes.cpu().double().t(), last(found)) > LEAST


@on_gpu
@pytest.mark.parametrize("loads", ["pointers", "copy engine"])
def test_large_products_of_bytes(loads, device):
    config = Gemm(loads, 128, 128, 64, 4, 3, 0, 8)
    m, n, k = 2**16 + 3, 2**15 + 5, 64
    x, codes = whole(m, k).to(device), whole(n, k).to(device)
    found = int8_mm.scaled_mm(x, codes, None, None, None, torch.int32, config)  # 8.6 GB
    assert torch.equal(found[-3:].cpu().long(), x[-3:].cpu().long() @ codes.cpu().long().t())
    del found
    ones = [torch.ones(size, device=device) for size in (m, n)]
    if torch.cuda.get_device_capability(device) >= (8, 9):
        floats = [each.to(torch.float8_e4m3fn) for each in (x, codes)]
        found = int8_mm.scaled_mm(*floats, *ones, None, torch.bfloat16, config)
        assert ao.sqnr(last(x) @ codes.cpu().double().t(), last(found)) > LEAST


@on_gpu
def test_large_products_of_4_bit_codes(device):
    m, n, k = 2**16 + 3, 2**15 + 5, 64
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8).to(device)
    scale = torch.ones(n, 2, device=device)
    found = int4_linear.dynamic_linear(x, packed, scale, None, 32)
    expected = ao.OPS.get("int8_dynamic_int4_linear").reference(x[-3:], packed, scale, None, 32)
    assert ao.sqnr(expected.cpu(), found[-3:].cpu()) > LEAST


@on_gpu
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantizing_many_rows(dtype, device):
    x = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
    x[-3:] = torch.randn(3, COLUMNS, device=device).bfloat16()
    codes, scale = int8_mm.quantize_rows(x, dtype)
    alone, alone_scale = int8_mm.quantize_rows(x[-3:].clone(), dtype)
    assert torch.equal(codes[-3:].float(), alone.float())
    assert torch.equal(scale[-3:], alone_scale)
    assert torch.equal(rounded_tokens(x)[-3:], rounded_tokens(x[-3:].clone()))


@on_gpu
def test_a_large_weight_in_floats(device):
    packed = torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8, device=device)
    absmax = torch.rand(ROWS, COLUMNS // 64, device=device)
    args = (None, None, COLUMNS, 64, 256, torch.bfloat16)
    found = nf4_linear.dequantize(packed, absmax, *args)
    expected = ao.OPS.get("nf4_dequantize").reference(packed[-3:], absmax[-3:], *args)
    assert torch.equal(found[-3:], expected)


@on_gpu
def test_parts_of_a_large_output_are_added(device):
    import triton

    from ao_kernels.device.many_rows import add_parts

    size = 2**29 + 1024
    parts = torch.zeros(5, size, device=device)  # 10.7 GB
    parts[:, :1024] = torch.arange(1, 6, device=device).float()[:, None]
    out = torch.zeros(size, device=device)
    add_parts[(triton.cdiv(1024, 1024),)](parts, parts, out, size, 1024, PARTS=5, BIAS=False, BLOCK=1024)
    assert torch.equal(out[:1024], torch.full((1024,), 15.0, device=device))
