"""torchao's names: each does what it did there, measured against float64 arithmetic or ao's own schemes."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao_core as ao
from ao_quant import torchao_compat as compat
from ao_quant.int4 import Int4TiledTensor

PAGE = Path(__file__).parents[2] / "docs" / "migrating-from-torchao.md"

# What a user of torchao 0.1 could import for quantization and dtypes, autoquant and GPTQ aside.
NAMES = [
    "apply_dynamic_quant", "apply_weight_only_int8_quant",
    "change_linear_weights_to_int4_woqtensors", "change_linear_weights_to_int8_dqtensors",
    "change_linear_weights_to_int8_woqtensors", "swap_conv2d_1x1_to_linear",
    "swap_linear_with_smooth_fq_linear", "smooth_fq_linear_to_inference", "set_smooth_fq_attribute",
    "get_scale", "SmoothFakeDynamicallyQuantizedLinear", "Int8DynActInt4WeightQuantizer",
    "Int4WeightOnlyQuantizer", "to_nf4", "linear_nf4", "NF4Tensor", "UInt4Tensor",
    "PerChannelSymmetricWeightUInt4Tensor", "Int8DynamicallyQuantizedLinearWeight",
    "Int8WeightOnlyQuantizedLinearWeight", "Int4WeightOnlyQuantizedLinearWeight", "safe_int_mm",
    "int_matmul", "int_scaled_matmul",
    "compute_error", "get_model_size_in_bytes", "dynamically_quantize_per_tensor",
    "dynamically_quantize_per_channel", "quantize_activation_per_token_absmax",
    "dequantize_per_tensor", "dequantize_per_channel", "quant_int8_matmul",
    "quant_int8_dynamic_linear", "quant_int8_per_token_matmul",
    "quant_int8_dynamic_per_token_linear", "get_groupwise_affine_qparams",
    "groupwise_affine_quantize_tensor_from_qparams",
    "groupwise_affine_dequantize_tensor_from_qparams", "groupwise_affine_quantize_tensor",
    "groupwise_affine_dequantize_tensor", "pack_tinygemm_scales_and_zeros",
    "unpack_tinygemm_scales_and_zeros", "get_group_qparams_symmetric",
    "group_quantize_tensor_symmetric", "pack_int4_from_int8", "unpack_int4_to_int8",
    "per_token_dynamic_quant",
]  # fmt: skip


def model_of(*, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()


def test_every_name_is_there_and_in_the_tables():
    page = PAGE.read_text("utf-8")
    assert sorted(set(NAMES) - set(compat.__all__)) == []
    assert sorted(name for name in NAMES if not re.search(rf"\b{name}\b", page)) == []
    assert sorted(name for name in compat.__all__ if not hasattr(compat, name)) == []


@pytest.mark.parametrize(
    ("convert", "scheme", "sqnr"),
    [
        (compat.apply_dynamic_quant, "int8-dynamic", 35),
        (compat.change_linear_weights_to_int8_dqtensors, "int8-dynamic", 35),
        (compat.apply_weight_only_int8_quant, "int8-weight-only", 40),
        (compat.change_linear_weights_to_int8_woqtensors, "int8-weight-only", 40),
        (compat.change_linear_weights_to_int4_woqtensors, "int4-weight-only:qparams=minmax", 15),
    ],
)
def test_the_conversions(convert, scheme, sqnr):
    model = model_of()
    expected = copy.deepcopy(model)
    report = convert(model)
    assert report.converted == {"0": scheme, "2": scheme}
    x = torch.randn(16, 64)
    assert ao.sqnr(expected(x), model(x)) > sqnr


def test_a_filter_picks_by_module_and_name():
    model = model_of()
    report = compat.change_linear_weights_to_int8_woqtensors(model, lambda module, name: name == "2")
    assert list(report.converted) == ["2"]
    with pytest.raises(ao.PlanError, match="no linear was chosen"):
        compat.change_linear_weights_to_int8_woqtensors(model_of(), lambda module, name: False)


def test_small_linears_keep_their_weight_by_default():
    """As torchao's default filter for activations in int8 has it."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(17, 8))
    assert list(compat.apply_dynamic_quant(model).converted) == ["2"]


def test_a_linear_alone_is_converted_in_place():
    linear = nn.Linear(64, 32)
    compat.change_linear_weights_to_int8_woqtensors(linear)
    assert isinstance(linear.weight, compat.Int8Tensor)


@pytest.mark.parametrize("groupsize", [32, 64, 128, 256])
def test_the_int4_options(groupsize):
    model = model_of()
    compat.change_linear_weights_to_int4_woqtensors(model, groupsize=groupsize, inner_k_tiles=4)
    assert model[0].weight.group_size == groupsize
    assert isinstance(model[0].weight, (compat.Int4Tensor, Int4TiledTensor))
    with pytest.raises(ao.OptionError, match="inner_k_tiles is 2, 4 or 8"):
        compat.change_linear_weights_to_int4_woqtensors(model_of(), inner_k_tiles=3)
    with pytest.raises(ao.OptionError, match="group_size"):
        compat.change_linear_weights_to_int4_woqtensors(model_of(), groupsize=48)


def test_the_quantizers_return_the_model():
    for quantizer, scheme in (
        (compat.Int8DynActInt4WeightQuantizer(groupsize=32), "int8-dynamic-int4-weight:qparams=minmax"),
        (compat.Int4WeightOnlyQuantizer(groupsize=64), "int4-weight-only:group_size=64,qparams=minmax"),
    ):
        model = model_of()
        assert quantizer.quantize(model) is model
        assert model[2].weight.scheme == scheme


@pytest.mark.parametrize(
    ("kind", "sqnr"),
    [
        (compat.Int8DynamicallyQuantizedLinearWeight, 35),
        (compat.Int8WeightOnlyQuantizedLinearWeight, 35),
        (compat.Int4WeightOnlyQuantizedLinearWeight, 15),
        (compat.PerChannelSymmetricWeightUInt4Tensor, 15),
    ],
)
def test_from_float(kind, sqnr):
    weight = torch.randn(33, 100)
    assert ao.sqnr(weight, kind.from_float(weight).dequantize()) > sqnr


def smooth_model(model, batches, alpha=0.5):
    compat.swap_linear_with_smooth_fq_linear(model, alpha=alpha)
    for batch in batches:
        model(batch)
    compat.smooth_fq_linear_to_inference(model)
    return model


def test_smoothing_against_the_equation():
    """Scales max|X|^α / max|W|^(1-α) in float64; the frozen linear holds int8 codes of W·s behind 1/s."""
    linear, x = nn.Linear(64, 32), torch.randn(128, 64) * torch.logspace(-2, 2, 64)
    model = smooth_model(nn.Sequential(copy.deepcopy(linear)), [x[:60], x[60:]], alpha=0.7)
    s = x.double().abs().amax(0) ** 0.7 / linear.weight.double().abs().amax(0) ** 0.3
    weight = model[0].weight
    torch.testing.assert_close(weight.input_scale.double(), 1 / s, rtol=1e-5, atol=0)
    codes = ao.parse_scheme("int8-dynamic").quantize((linear.weight * s.float()).detach())
    assert torch.equal(weight.base.codes, codes.codes)
    plain = ao.parse_scheme("int8-dynamic").quantize(linear.weight)
    expected = linear(x)
    assert ao.sqnr(expected, model(x)) > ao.sqnr(expected, F.linear(x, plain, linear.bias)) + 2


def test_smoothing_survives_a_dead_channel_and_a_file(tmp_path):
    x = torch.randn(50, 64)
    x[:, 7] = 0
    model = smooth_model(model_of(), [x])
    out = model(x)
    assert torch.isfinite(out).all()
    ao.save(model, tmp_path / "saved")
    plain = ao.load(tmp_path / "saved", model=model_of)
    assert torch.equal(plain(x), out)


def test_smoothing_skips_by_name_and_says_what_it_misses():
    model = model_of()
    compat.swap_linear_with_smooth_fq_linear(model, skip_fqn_list=["2"])
    assert type(model[2]) is nn.Linear
    with pytest.raises(ao.AoError, match=r"'0' saw no input while calibrating.*Nothing was changed"):
        compat.smooth_fq_linear_to_inference(model)
    compat.set_smooth_fq_attribute(model, "alpha", 0.25)
    assert model[0].alpha == 0.25
    compat.smooth_fq_linear_to_inference(model, debug_skip_calibration=True)
    assert (model[0].weight.input_scale == 1).all()
    with pytest.raises(ao.AoError, match="no linears of the model"):
        compat.swap_linear_with_smooth_fq_linear(model_of(), skip_fqn_list=["9"])
    with pytest.raises(ao.AoError, match="itself a Linear"):
        compat.swap_linear_with_smooth_fq_linear(nn.Linear(3, 3))


def test_nf4_has_its_gradient_for_the_input():
    weight, x = torch.randn(48, 100), torch.randn(5, 100, requires_grad=True)
    nf4 = compat.to_nf4(weight)
    assert isinstance(nf4, compat.NF4Tensor)
    compat.linear_nf4(x, nf4).sum().backward()
    torch.testing.assert_close(x.grad, nf4.dequantize().sum(0).expand(5, 100))


def test_the_small_ones():
    x = torch.randn(100)
    y = x + 0.01 * torch.randn(100)
    expected = 20 * torch.log10(x.norm() / (x - y).norm())
    torch.testing.assert_close(compat.compute_error(x, y), expected, rtol=1e-4, atol=1e-4)
    model = nn.Linear(64, 32)
    assert compat.get_model_size_in_bytes(model) == (64 * 32 + 32) * 4
    compat.change_linear_weights_to_int8_woqtensors(model)
    assert compat.get_model_size_in_bytes(model) == 64 * 32 + 32 * 4 + 32 * 4
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((17, 63), (63, 5)))
    assert torch.equal(compat.safe_int_mm(a, b), (a.long() @ b.long()).int())


@pytest.mark.parametrize("k", [1, 16, 17, 63, 100, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_integer_products(k, dtype):
    """Odd and even K: torchao's kernel read beyond a row where K was even but no multiple of a block."""
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((17, k), (k, 5)))
    exact = a.long() @ b.long()
    assert torch.equal(compat.int_matmul(a, b), exact.int())
    scales = (torch.rand(17, 1) + 0.1).to(dtype)
    found = compat.int_scaled_matmul(a, b, scales)
    assert found.dtype == dtype
    assert compat.compute_error(exact.double() * scales.double(), found.double()) > (
        50 if dtype == torch.bfloat16 else 120
    )


def test_scales_that_do_not_fit_are_named():
    a, b = torch.ones(3, 4, dtype=torch.int8), torch.ones(4, 2, dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"float scales of rows \[3, 1\], and was given torch.float32 \[1, 3\]"
    ):
        compat.int_scaled_matmul(a, b, torch.ones(1, 3))
    with pytest.raises(TypeError, match="int8 by int8"):
        compat.int_scaled_matmul(a.float(), b, torch.ones(3, 1))
