"""The float8 schemes against torch's own cast and float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ao_core as ao
from ao_quant.float8 import Float8Dynamic, Float8WeightOnly

FLOAT8 = torch.float8_e4m3fn
GRANULARITIES = pytest.mark.parametrize("granularity", ["row", "tensor"])


def gaussian(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def levels():
    """Every finite float8, in float64, and its bits."""
    bits = torch.arange(256, dtype=torch.uint8)
    values = bits.view(FLOAT8).double()
    return values[values.isfinite()], bits[values.isfinite()]


def nearest(values):
    """The float8 value nearest to each, by search; ties to the even one, as IEEE rounds."""
    table, bits = levels()
    distance = (values.double().unsqueeze(-1) - table).abs()
    closest = distance == distance.amin(-1, keepdim=True)
    return table[torch.where(closest, bits & 1, 2).argmin(-1)]


@GRANULARITIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (17, 63), (2, 3, 100)])
def test_values_are_the_nearest_float8_times_the_scale(shape, dtype, granularity):
    weight = gaussian(*shape, dtype=dtype)
    quantized = Float8WeightOnly(granularity=granularity).quantize(weight)
    absmax = (
        weight.float().abs().amax(-1, keepdim=True) if granularity == "row" else weight.float().abs().max()
    )
    scale = (absmax / 448).expand(*shape[:-1], 1)
    assert quantized.codes.dtype == FLOAT8
    assert torch.equal(
        quantized.codes.view(torch.uint8), (weight.float() / scale).to(FLOAT8).view(torch.uint8)
    )
    assert quantized.scale.shape == ((*shape[:-1], 1) if granularity == "row" else (1, 1))
    expected = nearest(weight.float() / scale) * scale.double()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    torch.testing.assert_close(quantized.dequantize().double(), expected, rtol=tolerance, atol=1e-7)


def test_the_largest_value_is_kept_and_nothing_becomes_nan():
    weight = torch.tensor(
        [[1.0, -1.0, 0.999999], [65504.0, 1e-7, 0.0], [1e-38, 0.0, 0.0], [3e38, -3e38, 1.0]]
    )
    found = Float8WeightOnly().quantize(weight).dequantize()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:, 0][[0, 1, 3]], weight[:, 0][[0, 1, 3]])
    assert not found[2].any()


def by_hand(x, weight, granularity):
    """Float64 products of values rounded to float8 by search."""

    def rounded(values):
        values = values.float()
        absmax = values.abs().amax(-1, keepdim=True) if granularity == "row" else values.abs().max()
        scale = absmax.clamp_min(1e-12) / 448
        return nearest(values / scale) * scale.double()

    return rounded(x) @ rounded(weight).t()


@GRANULARITIES
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_dynamic_multiplies_what_both_were_rounded_to(rows, granularity):
    """One scale a token and a row, or one each."""
    weight = gaussian(17, 63)
    x = gaussian(rows, 63, seed=1) * torch.logspace(-2, 2, rows).unsqueeze(1)
    found = F.linear(x, Float8Dynamic(granularity=granularity).quantize(weight))
    expected = by_hand(x, weight, granularity)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_scale_of_a_token_is_its_own_with_rows_only():
    """A large token beside it changes a token's result only with one scale for all."""
    weight, x = gaussian(32, 64), gaussian(2, 64, seed=1)
    loud = x.clone()
    loud[1] *= 1000
    by_row, by_tensor = (Float8Dynamic(granularity=one).quantize(weight) for one in ("row", "tensor"))
    assert torch.equal(F.linear(x, by_row)[0], F.linear(loud, by_row)[0])
    assert not torch.equal(F.linear(x, by_tensor)[0], F.linear(loud, by_tensor)[0])


def test_scales_by_row_keep_small_rows():
    weight = gaussian(32, 64) * torch.logspace(-6, 0, 32).unsqueeze(1)
    for granularity, enough in (("row", True), ("tensor", False)):
        found = Float8WeightOnly(granularity=granularity).quantize(weight).dequantize()
        assert (ao.sqnr(weight[0], found[0]) > 30) == enough


@GRANULARITIES
def test_rows_and_experts_can_be_taken(granularity):
    """A scale that all share stays whole."""
    quantized = Float8WeightOnly(granularity=granularity).quantize(gaussian(3, 17, 40))
    values = quantized.dequantize()
    assert torch.equal(quantized[1].dequantize(), values[1])
    assert torch.equal(quantized[1][3:9].dequantize(), values[1][3:9])
    assert torch.equal(F.embedding(torch.tensor([16, 0]), quantized[2]).float(), values[2][[16, 0]])
    torch.testing.assert_close(F.linear(torch.eye(40), quantized[2]), values[2].t())


def test_scales_that_differ_are_not_one_scale():
    scheme, weight = Float8WeightOnly(granularity="tensor"), gaussian(4, 8)
    qparams = Float8WeightOnly().choose_qparams(weight)
    with pytest.raises(ValueError, match=r"stores one scale.*granularity='row'"):
        scheme.pack(scheme.encode(weight, qparams), qparams, dtype=torch.float32)


@pytest.mark.parametrize("name", ["float8-weight-only", "float8-dynamic"])
def test_a_granularity_must_be_known(name):
    with pytest.raises(ao.OptionError, match="granularity 'row' or 'tensor', and was given 'column'"):
        ao.parse_scheme(name, granularity="column")


def test_only_rows_with_their_own_scales_are_quantized_in_slices(monkeypatch):
    monkeypatch.setattr("ao_core.scheme._SLICE", 7 * 50)
    weight = gaussian(40, 50) * torch.arange(1, 41).unsqueeze(1)
    for granularity in ("row", "tensor"):
        scheme = Float8WeightOnly(granularity=granularity)
        qparams = scheme.choose_qparams(weight)
        expected = scheme.decode(scheme.encode(weight, qparams), qparams)
        assert torch.equal(scheme.quantize(weight).dequantize(), expected)


def test_values_beyond_the_scale_become_the_largest():
    """Algorithms that change a weight between choosing a scale and encoding push some of it there."""
    scheme, weight = Float8WeightOnly(), gaussian(4, 63)
    qparams = scheme.choose_qparams(weight)
    found = scheme.decode(scheme.encode(100 * weight.sign() * weight.abs().amax(), qparams), qparams)
    torch.testing.assert_close(found, weight.sign() * weight.abs().amax(-1, keepdim=True))
