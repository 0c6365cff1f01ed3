"""4-bit weights: parameters and codes against float64 arithmetic, tiles against torch's own packing."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import ao_core as ao
from ao_quant import int4_tiles, ranges
from ao_quant.int4 import Int4Tensor, Int4TiledTensor, Int8DynamicInt4Tensor
from ao_quant.primitives import get_groupwise_affine_qparams, groupwise_affine_quantize_tensor_from_qparams


def weight_of(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(weight):
    return weight.portable()


@pytest.mark.parametrize(("k", "group_size"), [(576, 128), (100, 32), (17, 64), (576, -1), (1, 32)])
@pytest.mark.parametrize("zero_point", ["float", "integer", None])
def test_the_last_group_may_be_shorter(k, group_size, zero_point):
    """Each group alone gives what it gives within the row: no padding leaks into the range."""
    weight = weight_of(9, k) + 2
    scheme = ao.parse_scheme("int4-weight-only", group_size=group_size, zero_point=zero_point)
    whole = scheme.quantize(weight).dequantize()
    size = k if group_size == -1 else group_size
    for start in range(0, k, size):
        columns = slice(start, start + size)
        assert torch.equal(whole[:, columns], scheme.quantize(weight[:, columns]).dequantize())


def test_the_float_midpoint_is_torchaos():
    weight = weight_of(17, 256, dtype=torch.bfloat16)
    scales, zeros = get_groupwise_affine_qparams(weight, 4, 64)
    codes = groupwise_affine_quantize_tensor_from_qparams(weight, scales, zeros, 4, 64)
    scheme = ao.parse_scheme("int4-weight-only:group_size=64,qparams=minmax")
    qparams = scheme.choose_qparams(weight)
    assert torch.equal(qparams["scale"], scales)
    off = (qparams["zero"].float() - zeros.float()).abs()  # ours is made with the rounded scale
    assert (off <= 8 * scales.float() * 2**-7).all()
    ours = scheme.encode(weight, {"scale": scales, "zero": zeros})
    assert torch.equal(ours.int(), codes)


@pytest.mark.parametrize("zero_point", ["float", "integer", None])
def test_every_value_is_within_half_a_step(zero_point):
    """Against float64, for values within the range that the codes span."""
    weight = weight_of(33, 576)
    scheme = ao.parse_scheme("int4-weight-only", group_size=64, zero_point=zero_point, qparams="minmax")
    quantized = plain(scheme.quantize(weight))
    scale = quantized.scale.double().repeat_interleave(64, 1)
    error = (quantized.dequantize().double() - weight.double()).abs() / scale
    assert error.max() < (1.01 if zero_point is None else 0.6)  # absmax / 7.5 cuts half a step
    assert 0.2 < error.mean() < 0.3  # that of uniform rounding is a quarter


def test_zero_is_exact_with_an_integer_zero_point():
    weight = weight_of(5, 128) + 3
    weight[:, ::7] = 0
    values = ao.parse_scheme("int4-weight-only:zero_point=integer").quantize(weight).dequantize()
    assert not values[:, ::7].any()


@pytest.mark.parametrize("zero_point", ["float", "integer", None])
def test_mse_is_never_worse_than_minmax_in_any_group(zero_point):
    weight = weight_of(40, 576) ** 3  # long tails
    for group_size in (32, 128):
        errors = {}
        for method in ("minmax", "mse"):
            scheme = ao.parse_scheme(
                "int4-weight-only", group_size=group_size, zero_point=zero_point, qparams=method
            )
            off = (scheme.quantize(weight).dequantize().double() - weight.double()) ** 2
            groups, mask = ranges.grouped(off, group_size)
            errors[method] = (groups * mask).sum(-1)
        assert (errors["mse"] <= errors["minmax"] * (1 + 1e-6)).all()
        assert errors["mse"].sum() < 0.98 * errors["minmax"].sum()


def test_hqq_lowers_the_absolute_error_that_it_aims_at():
    weight = weight_of(40, 576) ** 3
    errors = [
        (ao.parse_scheme("int4-weight-only:group_size=64", qparams=m).quantize(weight).dequantize() - weight)
        .abs().mean()
        for m in ("minmax", "hqq")
    ]  # fmt: skip
    assert errors[1] < 0.97 * errors[0]


def test_hqq_needs_a_float_midpoint():
    with pytest.raises(ao.OptionError, match=r"hqq solves for a float midpoint.*zero_point=integer"):
        ao.parse_scheme("int4-weight-only:zero_point=integer,qparams=hqq")


@pytest.mark.parametrize("value", [3.0, -3.0, 1e-20, 3.001])
def test_constant_groups_keep_their_value(value):
    weight = torch.full((2, 64), value)
    for zero_point in ("float", "integer", None):
        values = ao.parse_scheme("int4-weight-only", zero_point=zero_point).quantize(weight).dequantize()
        torch.testing.assert_close(values, weight, rtol=0.07, atol=0)


def test_int8_activations_against_integers():
    """8da4w: the product of the codes in int64, scaled in float64."""
    weight, x = weight_of(17, 100), weight_of(5, 100, seed=1) * 3 + 1
    quantized = ao.parse_scheme("int8-dynamic-int4-weight").quantize(weight)
    assert isinstance(quantized, Int8DynamicInt4Tensor)
    low, high = x.double().amin(-1, keepdim=True), x.double().amax(-1, keepdim=True)
    scale = (high.clamp_min(0) - low.clamp_max(0)) / 255
    zero = (-128 - (low.clamp_max(0) / scale).round()).clamp(-128, 127)
    steps = ((x.double() / scale).round() + zero).clamp(-128, 127) - zero
    expected = steps @ quantized.dequantize().double().t() * scale
    assert ao.sqnr(expected, F.linear(x, quantized)) > 90


@pytest.mark.parametrize("shape", [(64, 256), (17, 100), (1, 1), (130, 576)])
@pytest.mark.parametrize("zero_point", ["float", "integer", None])
@pytest.mark.parametrize("tiling", ["tinygemm", "cpu-AVX512", "cpu-AVX2"])
def test_tiles_come_back_exactly(shape, zero_point, tiling):
    """On any device, whichever they were made for."""
    scheme = ao.parse_scheme("int4-weight-only", group_size=32, zero_point=zero_point)
    weight = plain(scheme.quantize(weight_of(*shape, dtype=torch.bfloat16)))
    tiled = Int4TiledTensor.from_plain(weight, tiling)
    again = tiled.portable()
    assert isinstance(again, Int4Tensor) and again.attributes() == weight.attributes()
    for name, data in weight.stored().items():
        assert torch.equal(data, again.stored()[name]), name
    rows = torch.tensor([shape[0] - 1, 0, shape[0] // 2])
    assert torch.equal(tiled.rows(rows).dequantize(), weight.dequantize()[rows])
    assert torch.equal(F.embedding(rows, tiled), weight.dequantize()[rows])


def test_cpu_tiles_are_torchs():
    """Compared with torch's own packing, as this processor's kernel has it."""
    tiling = f"cpu-{torch.backends.cpu.get_cpu_capability()}"
    if tiling not in ("cpu-AVX512", "cpu-AVX2"):
        pytest.skip(f"torch has no tiles for {tiling}")
    codes = torch.randint(0, 16, (128, 256), dtype=torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 8)
    scale = torch.ones(128, 8, dtype=torch.bfloat16)
    assert torch.equal(int4_tiles.tile(codes, scale, None, 32, tiling)[0], theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("k", [32, 64, 128, 576, 4096])
def test_cuda_tiles_are_torchs(k):
    codes = torch.randint(0, 16, (24, k), dtype=torch.uint8, device="cuda")
    scale = torch.ones(24, k // 32, dtype=torch.bfloat16, device="cuda")
    ours, _ = int4_tiles.tile(codes, scale, None, 32, "tinygemm")
    halves = codes[:, 1::2] | codes[:, ::2] << 4
    theirs = torch._convert_weight_to_int4pack(halves.contiguous(), ours.shape[3] * 2)
    assert torch.equal(ours, theirs)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a processor that can do with less"
)
def test_a_state_dict_tiled_on_another_processor_is_right_or_refused(tmp_path):
    """Tiles of AVX-512 read where torch uses AVX2: the layout travels with the tensor."""
    scheme = ao.parse_scheme("int4-weight-only:group_size=32")
    weight = plain(scheme.quantize(weight_of(64, 64)))
    tiled = Int4TiledTensor.from_plain(weight, "cpu-AVX512")
    torch.save({"weight": tiled, "values": weight.dequantize()}, tmp_path / "state.pt")
    code = (
        "import sys, torch, ao_core, ao_quant.int4; import torch.nn.functional as F\n"
        "state = torch.load(sys.argv[1], weights_only=True); w = state['weight']\n"
        "assert torch.backends.cpu.get_cpu_capability() == 'AVX2'\n"
        "assert torch.equal(w.dequantize(), state['values'])\n"
        "x = torch.ones(2, 64); torch.testing.assert_close(F.linear(x, w), x @ state['values'].t())\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "state.pt")]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_zeros_of_a_pruned_weight_stay_zero_with_a_float_midpoint():
    """Rows of one sign too; a group without zeros keeps its own midpoint, and little is lost by it."""
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0)) / 3
    weight[3], weight[4] = weight[3].abs() + 0.1, -weight[4].abs() - 2
    pruned = weight.clone()
    pruned[:, 1::2] = 0
    integer = ao.parse_scheme("int4-weight-only:group_size=32,zero_point=integer").quantize(pruned)
    for dtype in (torch.float32, torch.bfloat16):
        for method in ("minmax", "mse", "hqq"):
            scheme = ao.parse_scheme("int4-weight-only", group_size=32, qparams=method)
            values = scheme.quantize(pruned.to(dtype)).dequantize()
            assert not values[pruned == 0].any()
            assert ao.sqnr(pruned, values) > ao.sqnr(pruned, integer.dequantize()) - 3
            dense = scheme.quantize(weight.to(dtype)).portable()
            steps = dense.zero.float() / dense.scale.float()
            assert (steps - steps.round()).abs().max() > 0.2


@pytest.mark.parametrize("method", ["minmax", "mse", "hqq"])
def test_one_zero_changes_the_parameters_of_its_own_group_alone(method):
    """100 columns in groups of 64: the second is short, and holds the other zero."""
    weight = torch.randn(17, 100, generator=torch.Generator().manual_seed(0)) + 0.3
    holed = weight.clone()
    holed[3, 5] = holed[8, 99] = 0.0
    before, after = (
        ranges.choose(each, group_size=64, zero_point="float", method=method) for each in (weight, holed)
    )
    other = torch.ones(17, 2, dtype=torch.bool)
    other[3, 0] = other[8, 1] = False
    assert torch.equal(before.scale[other], after.scale[other])
    assert torch.equal(before.zero[other], after.zero[other])
    zero = torch.zeros(())
    for place in ((3, 0), (8, 1)):
        own = after.scale[place], after.zero[place]
        assert ranges.decode(ranges.encode(zero, *own), *own) == 0
