"""torchao's primitives against its tolerances, torch.ao's observers and float64."""

from __future__ import annotations

import pytest
import torch
from torch.ao.quantization.fx import _decomposed
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver
from torch.nn import functional as F

from ao_quant import primitives as q

SIZES = [1, 17, 63, 100, 576]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
EPS = torch.finfo(torch.float32).eps


def make(*shape, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def uniform(*shape, seed=0):
    """In [-1, 1): the input for which 8 bits promise 45 dB (a normal one has 42)."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def sqnr(exact, got):
    exact, got = exact.double(), got.double()
    return (20 * torch.log10(exact.norm() / (exact - got).norm())).item()


def int8_weight(n, k, dtype=torch.float32, device="cpu"):
    """``(weight [N, K], codes [K, N], scales [N])``."""
    weight = make(n, k, seed=1, dtype=dtype, device=device)
    codes, scales, _ = q.dynamically_quantize_per_channel(weight, -128, 127, torch.int8)
    return weight, codes.t(), scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("target", "low", "high"), [(torch.int8, -128, 127), (torch.uint8, 0, 255)])
@pytest.mark.parametrize("shape", [(1,), (17, 63), (2, 3, 100), (576, 4)])
def test_per_tensor_equals_the_observer(shape, target, low, high, dtype):
    x = make(*shape, dtype=dtype)
    observed = torch.qint8 if target == torch.int8 else torch.quint8
    observer = MinMaxObserver(observed, torch.per_tensor_affine, quant_min=low, quant_max=high)
    observer(x)
    want_scale, want_zero = observer.calculate_qparams()
    codes, scale, zero = q.dynamically_quantize_per_tensor(x, low, high, target)
    assert (codes.dtype, codes.shape) == (target, x.shape)
    assert (scale.dtype, scale.shape) == (dtype, (1,))
    assert (zero.dtype, zero.item()) == (torch.int32, want_zero.item())
    want = (torch.round(x.float() / want_scale) + want_zero).clamp(low, high)
    off = (codes - want).abs().max()
    if dtype == torch.float32:
        assert scale == want_scale
        assert off == 0
    else:
        torch.testing.assert_close(scale.float(), want_scale, rtol=2**-8, atol=1e-7)
        assert off <= 1
    back = q.dequantize_per_tensor(codes, scale, zero, dtype)
    assert back.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_tensor_sqnr(dtype):
    x = uniform(32, 32).to(dtype)
    back = q.dequantize_per_tensor(*q.dynamically_quantize_per_tensor(x, -128, 127, torch.int8), dtype)
    assert sqnr(x, back) > 45


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_tensor_symmetric(dtype):
    x = make(17, 63, dtype=dtype)
    codes, scale, zero = q.dynamically_quantize_per_tensor(
        x, -127, 127, torch.int8, qscheme=torch.per_tensor_symmetric
    )
    assert zero is None
    want = (x.double().abs().max() / 127).to(dtype)
    torch.testing.assert_close(scale, want.reshape(1), rtol=2**-8, atol=0)
    assert torch.equal(codes.double(), (x.double() / scale.double()).round().clamp(-127, 127))
    assert sqnr(x, q.dequantize_per_tensor(codes, scale, None, dtype)) > 38


def test_per_tensor_survives_what_float16_does_not():
    x = torch.tensor([-65504.0, 0.0, 65504.0], dtype=torch.float16)
    codes, scale, zero = q.dynamically_quantize_per_tensor(x, -128, 127, torch.int8)
    assert torch.isfinite(scale).all()
    torch.testing.assert_close(q.dequantize_per_tensor(codes, scale, zero), x.float(), rtol=0.01, atol=0)


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.empty(0, 4)])
def test_per_tensor_of_zeros_and_of_nothing(x):
    codes, scale, zero = q.dynamically_quantize_per_tensor(x, 0, 255, torch.uint8)
    assert scale.item() == EPS
    assert torch.equal(q.dequantize_per_tensor(codes, scale, zero), x)


def test_bad_arguments_per_tensor():
    x = make(3)
    with pytest.raises(ValueError, match="qscheme"):
        q.dynamically_quantize_per_tensor(x, 0, 255, torch.uint8, torch.per_channel_affine)
    with pytest.raises(ValueError, match="lose a sign"):
        q.dynamically_quantize_per_tensor(x, 0, 255, torch.uint8, torch.per_tensor_symmetric)
    with pytest.raises(ValueError, match="wider dtype"):
        q.dynamically_quantize_per_tensor(x, 0, 255, torch.int8)
    with pytest.raises(TypeError, match="float"):
        q.dynamically_quantize_per_tensor(x.int(), 0, 255, torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576,), (1, 100), (17, 63), (2, 3, 576), (0, 8)])
def test_per_token(shape, dtype, device):
    x = make(*shape, dtype=dtype, device=device)
    codes, scales = q.quantize_activation_per_token_absmax(x)
    assert (codes.dtype, codes.shape) == (torch.int8, x.shape)
    assert scales.shape == (*shape[:-1], 1)
    assert scales.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    want = x.double().abs().amax(-1, keepdim=True).clamp_min(1e-5).float() / 127
    assert torch.equal(scales, want.to(scales.dtype))
    steps = x.double() / scales.double()
    assert ((codes.double() - steps).abs() <= 0.5 + 1e-4).all()
    if x.numel():
        assert codes.abs().max() == 127


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token_sqnr(dtype):
    x = uniform(256, 576).to(dtype)
    codes, scales = q.quantize_activation_per_token_absmax(x)
    assert sqnr(x, codes.double() * scales) >= 45


def test_per_token_keeps_signs_where_bfloat16_rounds_the_scale_down():
    """The largest value is then beyond 127 steps."""
    x = torch.linspace(1, 2, 999).to(torch.bfloat16).unsqueeze(-1)
    codes, scales = q.quantize_activation_per_token_absmax(x)
    assert (x.double() / scales > 127.2).any()
    assert (codes == 127).all()
    assert (q.quantize_activation_per_token_absmax(-x)[0] == -127).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
def test_per_token_dynamic_quant(columns, dtype):
    x = make(2, 9, columns, dtype=dtype)
    x[0, 0] = 0
    x[0, 1] = x[0, 1].abs() + 3
    got = q.per_token_dynamic_quant(x)
    assert (got.dtype, got.shape) == (dtype, x.shape)
    decomposed = _decomposed.quantize_per_token, _decomposed.dequantize_per_token
    scale, zero = _decomposed.choose_qparams_per_token_asymmetric(x.float(), torch.int8)
    codes = decomposed[0](x.float(), scale, zero, -128, 127, torch.int8)
    want = decomposed[1](codes, scale, zero, -128, 127, torch.int8, torch.float32)
    # The zero point may round the other way: one step.
    slack = 2**-8 * x.double().abs() if dtype == torch.bfloat16 else 2**-10 * x.double().abs()
    assert ((got.double() - want).abs() <= scale * 1.001 + slack).all()
    assert (got[0, 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("low", [-128, -127])
def test_per_channel(low, columns, dtype):
    x = make(17, columns, dtype=dtype)
    x[3] = 0
    x[4, 0] = 100
    codes, scale, zero = q.dynamically_quantize_per_channel(x, low, 127, torch.int8)
    observer = PerChannelMinMaxObserver(
        0, torch.qint8, torch.per_channel_symmetric, quant_min=low, quant_max=127, eps=EPS
    )
    observer(x)
    want, _ = observer.calculate_qparams()
    assert (scale.dtype, scale.shape) == (dtype, (17,))
    torch.testing.assert_close(scale, want.to(dtype), rtol=0, atol=0)
    assert (zero.dtype, zero.tolist()) == (torch.int64, [0] * 17)
    ints = torch.round(x.double() / want.double()[:, None]).clamp(low, 127)
    assert (codes - ints).abs().max() <= 1
    back = q.dequantize_per_channel(codes, scale, zero, torch.float32)
    torch.testing.assert_close(back, x.float(), atol=1.01 * scale.max().item(), rtol=1e-4)
    assert torch.equal(back, codes.float() * scale.float()[:, None])
    assert torch.equal(q.dequantize_per_channel(codes, scale, None, torch.float32), back)


def test_bad_arguments_per_channel():
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        q.dynamically_quantize_per_channel(make(2, 3, 4), -128, 127, torch.int8)
    with pytest.raises(ValueError, match="lose a sign"):
        q.dynamically_quantize_per_channel(make(3, 4), 0, 255, torch.uint8)
    with pytest.raises(ValueError, match="scales"):
        q.dequantize_per_channel(torch.ones(3, 4, dtype=torch.int8), make(4), None)


def test_dequantize_keeps_its_input_and_promotes():
    codes = torch.tensor([1.0, 2.0])
    zero = torch.tensor([1], dtype=torch.int32)
    assert q.dequantize_per_tensor(codes, torch.tensor([2.0]), zero).tolist() == [0.0, 2.0]
    assert codes.tolist() == [1.0, 2.0]
    half, wide = torch.tensor([2.0]).half(), torch.tensor([2.0])
    assert q.dequantize_per_tensor(codes, half, None, torch.float16).dtype == torch.float16
    assert q.dequantize_per_tensor(codes, wide, None, torch.float16).dtype == torch.float32
    assert q.dequantize_per_tensor(codes, wide[0], None, torch.float16).dtype == torch.float16


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_bit", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "groupsize"), [(1, 128), (17, 17), (63, 9), (100, 128), (576, 32)])
def test_groupwise_affine(columns, groupsize, n_bit, dtype):
    w = make(6, columns, dtype=dtype) + 5
    w[0], w[1], w[2, 0] = 0, 5, 50
    size, half, top = min(groupsize, columns), 2 ** (n_bit - 1), 2**n_bit - 1
    scales, zeros = q.get_groupwise_affine_qparams(w, n_bit, groupsize)
    groups = w.double().reshape(6, -1, size)
    span = (groups.amax(-1) - groups.amin(-1)).clamp_min(1e-6)
    for got, want in ((scales, span / top), (zeros, groups.amin(-1) + half * span / top)):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=0)

    codes, packed = q.groupwise_affine_quantize_tensor(w, n_bit, groupsize)
    assert codes.dtype == torch.int32
    assert codes.shape == w.shape
    assert codes.min() >= 0
    assert codes.max() <= top
    s, z = (t.double().repeat_interleave(size, 1) for t in (scales, zeros))
    want = ((w.double() - (z - half * s)) / s).clamp(0, top)
    assert ((codes - want).abs() <= 0.5 + 1e-3 * top).all()
    back = q.groupwise_affine_dequantize_tensor(codes, packed, n_bit, groupsize)
    assert back.dtype == torch.bfloat16
    torch.testing.assert_close(back.double(), (codes - half) * s + z, rtol=2**-8, atol=1e-6)
    byte = q.groupwise_affine_dequantize_tensor(codes.to(torch.uint8), packed, n_bit, groupsize)
    assert torch.equal(byte, back)


def test_groupwise_affine_one_column_at_a_time():
    w = make(6, 64)
    scales, zeros = q.get_groupwise_affine_qparams(w, 4, 32)
    whole = q.groupwise_affine_quantize_tensor_from_qparams(w, scales, zeros, 4, 32)
    back = q.groupwise_affine_dequantize_tensor_from_qparams(whole, scales, zeros, 4, 32)
    for j in range(64):
        own = scales[:, j // 32 : j // 32 + 1], zeros[:, j // 32 : j // 32 + 1]
        codes = q.groupwise_affine_quantize_tensor_from_qparams(w[:, j : j + 1], *own, 4, 32)
        assert torch.equal(codes, whole[:, j : j + 1])
        one = q.groupwise_affine_dequantize_tensor_from_qparams(codes, *own, 4, 32)
        assert torch.equal(one, back[:, j : j + 1])


def test_groupwise_sqnr_of_four_bits():
    w = make(64, 256)
    back = q.groupwise_affine_dequantize_tensor(*q.groupwise_affine_quantize_tensor(w, 4, 32), 4, 32)
    assert sqnr(w, back) > 20


def test_tinygemm_qparams_come_back():
    scales, zeros = make(5, 3, dtype=torch.bfloat16), make(5, 3, dtype=torch.bfloat16, seed=1)
    packed = q.pack_tinygemm_scales_and_zeros(scales, zeros)
    assert packed.shape == (3, 5, 2)
    assert packed.is_contiguous()
    assert packed[1, 4].tolist() == [scales[4, 1], zeros[4, 1]]
    for got, want in zip(q.unpack_tinygemm_scales_and_zeros(packed), (scales, zeros), strict=True):
        assert torch.equal(got, want)


def test_bad_arguments_groupwise():
    w = make(4, 100)
    scales = zeros = torch.ones(4, 1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="does not divide 100"):
        q.get_groupwise_affine_qparams(w, 4, 32)
    with pytest.raises(ValueError, match="does not divide 100"):
        q.group_quantize_tensor_symmetric(w, 4, 32)
    with pytest.raises(ValueError, match="at least 2"):
        q.get_groupwise_affine_qparams(w, 4, 1)
    with pytest.raises(ValueError, match="n_bit"):
        q.get_group_qparams_symmetric(w, 1)
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        q.get_groupwise_affine_qparams(w[0])
    with pytest.raises(ValueError, match="does not divide"):
        q.get_groupwise_affine_qparams(w[:, :0])
    with pytest.raises(TypeError, match="int8"):
        q.get_groupwise_affine_qparams(w.to(torch.int8))
    with pytest.raises(TypeError, match="int8"):
        q.groupwise_affine_quantize_tensor_from_qparams(w.to(torch.int8), scales, zeros)
    with pytest.raises(ValueError, match="scales and zeros"):
        q.groupwise_affine_quantize_tensor_from_qparams(w, scales, zeros, 4, 50)
    with pytest.raises(TypeError, match="bfloat16"):
        q.pack_tinygemm_scales_and_zeros(scales.float(), zeros)
    with pytest.raises(ValueError, match=r"\[N, G\]"):
        q.pack_tinygemm_scales_and_zeros(scales, zeros[:2])
    with pytest.raises(ValueError, match=r"\[G, N, 2\]"):
        q.unpack_tinygemm_scales_and_zeros(scales)


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("n_bit", [4, 8])
def test_group_symmetric_equals_the_observer(n_bit, precision):
    w = make(10, 512, dtype=torch.float16)
    low, high = -(2 ** (n_bit - 1)), 2 ** (n_bit - 1) - 1
    observer = PerChannelMinMaxObserver(
        0, torch.qint8, torch.per_channel_symmetric, quant_min=low, quant_max=high, eps=EPS
    )
    observer(w.reshape(-1, 256))
    want, _ = observer.calculate_qparams()
    scales, zeros = q.get_group_qparams_symmetric(w, n_bit, 256, precision)
    torch.testing.assert_close(scales, want.reshape(10, 2).to(precision), rtol=0, atol=0)
    assert scales.shape == zeros.shape == (10, 2)
    assert zeros.dtype == precision
    assert not zeros.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_bit", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("columns", "groupsize"), [(1, 32), (63, 9), (100, 128), (576, 32)])
def test_group_symmetric_codes_have_the_bits_asked_for(columns, groupsize, n_bit, dtype):
    w = make(6, columns, dtype=dtype)
    w[0] = 0
    codes, scales, zeros = q.group_quantize_tensor_symmetric(w, n_bit, groupsize)
    low, high = -(2 ** (n_bit - 1)), 2 ** (n_bit - 1) - 1
    assert codes.dtype == torch.int8
    assert codes.shape == w.shape
    assert not zeros.any()
    assert codes.min() >= low
    assert codes.max() <= high
    step = scales.double().repeat_interleave(min(groupsize, columns), 1)
    want = (w.double() / step).clamp(low, high)
    assert ((codes - want).abs() <= 0.5 + 1e-4).all()
    if columns > 1:
        assert max(-codes.min().item() - 1, codes.max().item()) == high
    with pytest.raises(ValueError, match="NaN"):
        q.get_group_qparams_symmetric(torch.full((1, 4), torch.nan), n_bit, 4)


def test_int4_pairs_come_back_signs_and_all():
    every = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = q.pack_int4_from_int8(every.reshape(2, -1))
    assert packed.dtype == torch.int8
    assert packed.shape == (2, 128)
    want = [(hi % 16) * 16 + lo % 16 for hi, lo in every.tolist()]
    assert packed.view(torch.uint8).flatten().tolist() == want
    for view in (packed, packed.view(torch.uint8)):
        assert torch.equal(q.unpack_int4_to_int8(view), every.reshape(2, -1))


def test_bad_arguments_of_int4_pairs():
    codes = torch.tensor([[-8, 7]], dtype=torch.int8)
    with pytest.raises(ValueError, match="pad to even"):
        q.pack_int4_from_int8(codes[:, :1])
    for bad in (codes - 1, codes + 1):
        with pytest.raises(ValueError, match="4 signed bits"):
            q.pack_int4_from_int8(bad)
    with pytest.raises(TypeError, match="int64"):
        q.pack_int4_from_int8(codes.long())
    with pytest.raises(TypeError, match="int64"):
        q.unpack_int4_to_int8(codes.long())


def test_every_name_is_public_and_torch_got_no_new_ops():
    for name in q.__all__:
        assert getattr(q, name).__doc__
    assert not hasattr(torch.ops.quantized_decomposed, "pack_int4_from_int8")
