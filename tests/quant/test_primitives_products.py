"""torchao's int8 products against float64."""

from __future__ import annotations

import pytest
import torch
from primitive_cases import DEVICES, DTYPES, int8_weight, make, sqnr, uniform
from torch.nn import functional as F

from ao_quant import primitives as q


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [torch.int8, torch.uint8])
@pytest.mark.parametrize(("lead", "k", "n"), [((), 576, 17), ((1,), 1, 1), ((2, 3), 63, 100), ((0,), 8, 8)])
def test_matmul_is_the_product_of_what_the_codes_mean(lead, k, n, target, dtype, device):
    generator = torch.Generator().manual_seed(0)
    info = torch.iinfo(target)
    x = torch.randint(info.min, info.max + 1, (*lead, k), generator=generator).to(device, target)
    w = torch.randint(-128, 128, (k, n), generator=generator).to(device, torch.int8)
    sx, sw = torch.tensor([0.01], device=device), make(n, device=device).abs().to(dtype)
    zero = torch.tensor([info.min + 30], dtype=torch.int32, device=device)
    for zx, sums in ((zero, w.sum(0)), (zero, None), (zero.item(), None), (None, None)):
        shift = 0 if zx is None else info.min + 30
        exact = (x.double() - shift) @ w.double() * sx.double() * sw.double()
        got = q.quant_int8_matmul(x, sx, zx, w, sums, sw, dtype)
        assert (got.dtype, got.shape) == (dtype, (*lead, n))
        torch.testing.assert_close(got, exact.float().to(dtype))
    if target == torch.int8:
        rows = make(*lead, 1, device=device).abs()
        exact = x.double() @ w.double() * rows.double() * sw.double()
        got = q.quant_int8_per_token_matmul(x, rows, w, sw, dtype)
        torch.testing.assert_close(got, exact.float().to(dtype))


def test_a_long_sum_loses_nothing_before_it_is_scaled():
    """Two sums that float32 (and bfloat16) would round to one number."""
    x = torch.full((2, 4096), 127, dtype=torch.int8)
    x[1, 0] = 126
    w = torch.full((4096, 1), 127, dtype=torch.int8)
    zero = torch.tensor([[127 - 1]], dtype=torch.int32)
    got = q.quant_int8_matmul(x, torch.ones(1), zero, w, None, torch.ones(1))
    assert got.tolist() == [[127.0 * 4096], [127.0 * 4095]]
    scales = torch.full((2, 1), 2.0**-20, dtype=torch.bfloat16)
    got = q.quant_int8_per_token_matmul(x, scales, w, torch.ones(1), torch.float32)
    sums = torch.tensor([127 * 127 * 4096, 127 * 127 * 4096 - 127], dtype=torch.float32)
    assert got.flatten().tolist() == (sums / 2**20).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "k", "n"), [((17,), 576, 64), ((2, 5), 100, 63), ((1,), 576, 576)])
@pytest.mark.parametrize("biased", [True, False])
def test_dynamic_linears(lead, k, n, dtype, biased, device):
    x = make(*lead, k, dtype=dtype, device=device)
    weight, codes, scales = int8_weight(n, k, dtype, device)
    bias = make(n, seed=2, device=device, dtype=dtype) if biased else None
    kept = None if bias is None else bias.clone()
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    token = q.quant_int8_dynamic_per_token_linear(x, codes, scales, bias, dtype)
    sums = codes.sum(0, dtype=torch.int64)
    tensor = q.quant_int8_dynamic_linear(x, 0, 255, torch.uint8, codes, scales, sums, bias, dtype)
    signed = q.quant_int8_dynamic_linear(x, -128, 127, torch.int8, codes, scales, None, bias, dtype)
    for got, bar in ((token, 37.5), (tensor, 35), (signed, 35)):
        assert (got.dtype, got.shape) == (dtype, (*lead, n))
        assert sqnr(exact, got) >= bar
    assert bias is None or torch.equal(bias, kept)


def test_the_bias_is_added_before_the_one_rounding():
    """1 + 2**-8 is halfway between bfloat16 numbers: rounded alone, it would lose the bias too."""
    x, w = torch.ones(1, 1), torch.full((1, 1), 127, dtype=torch.int8)
    scales, bias = torch.tensor([(1 + 2**-8) / 127]), torch.tensor([2.0**-9])
    token = q.quant_int8_dynamic_per_token_linear(x, w, scales, bias, torch.bfloat16)
    assert token.item() == 1 + 2**-7


def test_dynamic_linears_on_torchaos_bar():
    """Per token 42 dB, per tensor 37.5 dB, on uniform inputs as torchao's tests have them."""
    x, weight = uniform(32, 64), uniform(256, 64, seed=1)
    codes, scales, _ = q.dynamically_quantize_per_channel(weight, -128, 127, torch.int8)
    exact = F.linear(x.double(), weight.double())
    token = q.quant_int8_dynamic_per_token_linear(x, codes.t(), scales, None, torch.float32)
    tensor = q.quant_int8_dynamic_linear(x, -128, 127, torch.int8, codes.t(), scales, None, None)
    assert sqnr(exact, token) >= 42
    assert sqnr(exact, tensor) >= 37.5


def test_bad_arguments_of_products():
    x, w = torch.ones(2, 4, dtype=torch.int8), torch.ones(4, 3, dtype=torch.int8)
    one, scales = torch.ones(1), torch.ones(3)
    with pytest.raises(TypeError, match="int16"):
        q.quant_int8_matmul(x.short(), one, None, w, None, scales)
    with pytest.raises(TypeError, match="int8 by int8"):
        q.quant_int8_matmul(x, one, None, w.float(), None, scales)
    for call in (
        lambda: q.quant_int8_matmul(x, one, None, w, None, scales.half()),
        lambda: q.quant_int8_dynamic_linear(x.float(), -128, 127, torch.int8, w, scales.half(), None, None),
    ):
        with pytest.raises(TypeError, match="w_scales"):
            call()
    with pytest.raises(ValueError, match="3 outputs"):
        q.quant_int8_matmul(x, one, None, w, None, torch.ones(2))
    with pytest.raises(ValueError, match=r"\[K, N\]"):
        q.quant_int8_matmul(x, one, None, w.t(), None, scales)
    with pytest.raises(ValueError, match="one scale a token"):
        q.quant_int8_per_token_matmul(x, torch.ones(3), w, scales)
    with pytest.raises(TypeError, match="uint8"):
        q.quant_int8_per_token_matmul(x.view(torch.uint8), torch.ones(2), w, scales)
    got = q.quant_int8_per_token_matmul(x, torch.tensor([1.0, 2.0]), w, scales)
    assert got.tolist() == [[4.0] * 3, [8.0] * 3]
