"""torchao's primitives for tensors, tokens and channels against its tolerances, observers and float64."""

from __future__ import annotations

import pytest
import torch
from primitive_cases import DEVICES, DTYPES, EPS, SIZES, make, sqnr, uniform
from torch.ao.quantization.fx import _decomposed
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from ao_quant import primitives as q


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


def test_every_name_is_public_and_torch_got_no_new_ops():
    for name in q.__all__:
        assert getattr(q, name).__doc__
    assert not hasattr(torch.ops.quantized_decomposed, "pack_int4_from_int8")
