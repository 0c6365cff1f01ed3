"""The scheme nf4: against float64 arithmetic and bitsandbytes; its double quantization; its memory."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

import ao_core as ao
from ao_quant.nf4 import Nf4, compress_absmax, largest_of_blocks
from ao_quant.nf4_ops import NF4_LEVELS, block_absmax

PLAIN = Nf4(double_quant=False)
LARGEST = torch.finfo(torch.float32).max
SHAPES = [(1, 1), (17, 63), (5, 64), (3, 576), (2, 3, 5, 100)]


def gaussian(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nearest_levels(weight, block_size):
    """The definition in float64: each value becomes the nearest level times its block's absmax."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    blocks = [block.double() for block in weight.split(block_size, -1)]
    scales = [block.abs().amax(-1, keepdim=True) for block in blocks]
    return torch.cat(
        [
            levels[((block / scale).unsqueeze(-1) - levels).abs().argmin(-1)] * scale
            for block, scale in zip(blocks, scales, strict=True)
        ],
        -1,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [64, 10])
def test_values_are_the_nearest_levels(shape, block_size):
    weight = gaussian(*shape)
    quantized = Nf4(double_quant=False, block_size=block_size).quantize(weight)
    expected = nearest_levels(weight, block_size)
    torch.testing.assert_close(quantized.dequantize().double(), expected, rtol=1e-6, atol=0)
    blocks = -(-shape[-1] // block_size)
    assert quantized.absmax.shape == (*shape[:-1], blocks)
    assert quantized.packed.shape == (*shape[:-1], -(-shape[-1] // 2))
    assert quantized.offset is quantized.step is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(17, 64), (100, 576), (33, 1024)])
def test_values_are_those_of_bitsandbytes(dtype, shape):
    """It multiplies by 1 / absmax where we divide: values on the border of two levels may take either."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(*shape, dtype=dtype)
    theirs = functional.dequantize_4bit(
        *functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    )
    ours = PLAIN.quantize(weight).dequantize()
    differ = ours != theirs
    assert differ.float().mean() < 1e-4
    largest = largest_of_blocks(weight, 64).repeat_interleave(64, -1)[differ]
    middles = (torch.tensor(NF4_LEVELS[1:]) + torch.tensor(NF4_LEVELS[:-1])) / 2
    scaled = (weight[differ].float() / largest).unsqueeze(-1)
    assert torch.all((scaled - middles).abs().amin(-1) < 1e-6)


def error(weight, found, columns=slice(None)):
    return float((weight - found)[:, columns].float().norm() / weight[:, columns].float().norm())


@pytest.mark.parametrize("outliers", [False, True])
def test_double_quantization_errs_no_more_than_that_of_bitsandbytes(outliers):
    """Both within 2 % of no double quantization; with outliers theirs loses 8 %, ours stays."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(128, 4096)
    if outliers:
        weight[::7, 5] *= 1000
    quiet = slice(64, None)  # columns whose blocks hold no outlier
    theirs = functional.dequantize_4bit(
        *functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    )
    plain = error(weight, PLAIN.quantize(weight).dequantize(), quiet)
    ours = error(weight, Nf4().quantize(weight).dequantize(), quiet)
    assert ours < 1.02 * plain
    assert ours < 1.02 * error(weight, theirs, quiet)
    assert (error(weight, theirs, quiet) > 1.05 * plain) == outliers


def roots_by_hand(absmax, scaler_block_size):
    """The grid in float64, one scaler block at a time."""
    found = []
    for group in absmax.double().split(scaler_block_size, -1):
        root = group**0.25
        low = torch.where(root > 0, root, torch.inf).amin(-1, keepdim=True)
        high = root.amax(-1, keepdim=True)
        low = torch.minimum(low, high)
        step = (high - low) / 255
        codes = ((root - low) / torch.where(step > 0, step, 1)).round().clamp(0, 255)
        found.append((low + codes * step) ** 4)
    return torch.cat(found, -1)


@pytest.mark.parametrize("shape", [(17, 1), (17, 9), (2, 3, 100)])
@pytest.mark.parametrize("scaler_block_size", [1, 4, 256])
def test_absmax_lies_on_a_grid_of_fourth_roots(shape, scaler_block_size):
    absmax = gaussian(*shape).abs() + 0.01
    codes, offset, step = compress_absmax(absmax, scaler_block_size)
    assert codes.shape == shape
    assert offset.shape == step.shape == (*shape[:-1], -(-shape[-1] // scaler_block_size))
    found = block_absmax(codes, offset, step, scaler_block_size=scaler_block_size)
    torch.testing.assert_close(found.double(), roots_by_hand(absmax, scaler_block_size), rtol=2e-6, atol=0)


def test_an_outlier_leaves_the_absmax_of_the_other_blocks_within_four_percent():
    absmax = gaussian(500, 64).abs() / 8 + 1
    absmax[:, 3] = 1000
    found = block_absmax(*compress_absmax(absmax, 256), scaler_block_size=256)
    errors = (found / absmax - 1).abs()
    assert errors.max() < 0.04
    assert errors.square().mean().sqrt() < 0.022
    low, high = absmax.aminmax(dim=-1, keepdim=True)
    evenly = low + ((absmax - low) / (high - low) * 255).round() * (high - low) / 255
    assert (evenly / absmax - 1).abs().max() > 0.2


def test_empty_blocks_do_not_widen_the_grid():
    absmax = 1 + gaussian(5, 64).abs()
    expected = block_absmax(*compress_absmax(absmax[:, :40], 256), scaler_block_size=256)
    absmax[:, 40:] = 0
    found = block_absmax(*compress_absmax(absmax, 256), scaler_block_size=256)
    assert torch.equal(found[:, :40], expected)
    weight = gaussian(5, 256)
    weight[:, 64:192] = 0
    assert not Nf4().quantize(weight).dequantize()[:, 64:192].any()


@pytest.mark.parametrize("columns", [64, 100, 576])
def test_the_least_squared_error_of_a_block(columns):
    """Against float64 and 701 multiples of the absmax; blocks of zeros and of one weight stay exact."""
    weight = gaussian(17, columns)
    weight[3, :64] = 0
    weight[5] = 0
    weight[5, 7] = 2.5
    quantized = Nf4(double_quant=False, qparams="mse").quantize(weight)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    middles = (levels[1:] + levels[:-1]) / 2
    for group, block in enumerate(weight.double().split(64, -1)):
        full = block.abs().amax(-1, keepdim=True)
        powers = []
        for factor in torch.linspace(0.6, 1.3, 701, dtype=torch.float64):
            scale = (full * factor).clamp_min(1e-30)
            powers.append((levels[torch.bucketize(block / scale, middles)] * scale - block).square().sum(-1))
        found = quantized.dequantize()[:, group * 64 : group * 64 + 64].double() - block
        least, plain = torch.stack(powers).amin(0), powers[400]
        power = found.square().sum(-1)
        assert (power <= plain * (1 + 1e-6)).all() and (power >= least * (1 - 1e-6)).all()
        assert power.sum() <= 1.02 * least.sum()
    rounded = PLAIN.quantize(weight).dequantize()
    assert (quantized.dequantize() - weight).norm() < 0.95 * (rounded - weight).norm()
    assert torch.equal(quantized.dequantize()[5], weight[5])


def test_zeros_get_the_level_zero():
    weight = torch.zeros(3, 100)
    for scheme in (Nf4(), PLAIN):
        assert (scheme.encode(weight, scheme.choose_qparams(weight)) == NF4_LEVELS.index(0.0)).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-30, 1e-42, LARGEST, -LARGEST])
@pytest.mark.parametrize("scheme", [Nf4(), PLAIN, Nf4(qparams="mse")], ids=str)
def test_constant_weights_are_kept(value, scheme):
    """To within the grid; below 1e-38, where float32 has few digits left, they may become zero."""
    weight = torch.full((3, 100), value)
    found = scheme.quantize(weight).dequantize()
    assert torch.isfinite(found).all()
    wanted = weight if abs(value) > 1e-38 else torch.zeros(())
    torch.testing.assert_close(found, wanted.expand_as(found), rtol=1e-5, atol=1e-38)


def test_what_was_read_back_is_found_again():
    """The bytes of values that lie on a grid already are those of the grid."""
    scheme, weight = Nf4(scaler_block_size=5), gaussian(33, 1000)
    qparams = scheme.choose_qparams(weight)
    codes = scheme.encode(weight, qparams)
    packed = scheme.pack(codes, qparams, dtype=torch.float32)
    torch.testing.assert_close(packed.dequantize(), scheme.decode(codes, qparams), rtol=1e-6, atol=0)
    first = compress_absmax(largest_of_blocks(weight, 64), 5)[0]
    assert torch.equal(packed.absmax, first)


def test_groups_that_were_chosen_alone_can_be_packed():
    """Each on a grid of its own, as GPTQ leaves them: the row's grid rounds them once more."""
    scheme, weight = Nf4(), gaussian(33, 200)
    parts = weight.split(64, 1)
    chosen = [scheme.choose_qparams(part) for part in parts]
    codes = torch.cat([scheme.encode(part, own) for part, own in zip(parts, chosen, strict=True)], 1)
    absmax = torch.cat([own["absmax"] for own in chosen], 1)
    torch.testing.assert_close(absmax, largest_of_blocks(weight, 64), rtol=1e-6, atol=0)
    packed = scheme.pack(codes, {"absmax": absmax}, dtype=torch.float32)
    decoded = scheme.decode(codes, {"absmax": absmax})
    assert ao.sqnr(decoded, packed.dequantize()) > 45
    assert ao.sqnr(weight, packed.dequantize()) > scheme.min_sqnr


def test_columns_within_a_block_are_encoded_alone():
    scheme, weight = Nf4(), gaussian(17, 200)
    qparams = scheme.choose_qparams(weight)
    codes = scheme.encode(weight, qparams)
    for column in (0, 63, 64, 199):
        own = {"absmax": qparams["absmax"][:, column // 64, None]}
        part = weight[:, column : column + 1]
        assert torch.equal(scheme.encode(part, own), codes[:, column : column + 1])
        assert torch.equal(
            scheme.decode(codes[:, column : column + 1], own), scheme.decode(codes, qparams)[:, column, None]
        )


def test_slices_of_rows_give_the_same(monkeypatch):
    weight = gaussian(100, 200, dtype=torch.bfloat16)
    whole = Nf4().quantize(weight)
    monkeypatch.setattr("ao_core.scheme._SLICE", 7 * 200)
    monkeypatch.setattr("ao_quant.nf4._ELEMENTS", 3 * 200)
    sliced = Nf4().quantize(weight)
    for name, stored in whole.stored().items():
        assert torch.equal(stored, sliced.stored()[name]), name


def test_an_input_of_another_width_is_refused():
    """Odd widths leave half a byte, so that the op alone could not tell 63 from 64."""
    weight = Nf4().quantize(gaussian(17, 63))
    for x in (torch.ones(2, 64), torch.ones(2, 62)):
        with pytest.raises(RuntimeError, match="63 input features"):
            F.linear(x, weight)
        with pytest.raises(RuntimeError, match="63 input features"):
            x @ weight.t()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 0}, "block_size 1 or more.*given 0"),
        ({"block_size": "64"}, "block_size 1 or more.*given '64'"),
        ({"scaler_block_size": -1}, "scaler_block_size 1 or more.*given -1"),
        ({"block_size": True}, "block_size 1 or more.*given True"),
        ({"double_quant": 1}, "double_quant true or false.*given 1"),
        ({"qparams": "minmax"}, "qparams 'absmax' or 'mse'.*given 'minmax'"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ao.OptionError, match=words):
        ao.parse_scheme("nf4", **options)


PEAK = """
import re, sys, torch, ao_core as ao
from pathlib import Path

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

rows, columns = map(int, sys.argv[1:])
scheme = ao.parse_scheme("nf4")
scheme.quantize(torch.ones(64, columns, dtype=torch.bfloat16))
weight = torch.empty(rows, columns, dtype=torch.bfloat16).normal_()
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = resident("VmRSS")
quantized = scheme.quantize(weight)
print(weight.nbytes, ao.stored_bytes(quantized), resident("VmHWM") - before)
"""
needs_peak = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak memory to be read"
)


def peak(run_python, rows, columns):
    """Bytes of the weight, of the result, and that memory grew by."""
    done = run_python(PEAK, str(rows), str(columns))
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@needs_peak
def test_quantizing_takes_some_megabytes_beside_the_result(run_python):
    """Much less than the 131 MB of a float32 copy: what a larger weight needs, too."""
    _, stored, grown = peak(run_python, 32064, 1024)
    assert grown - stored < 48_000_000


@needs_peak
@pytest.mark.slow
def test_a_head_of_a_gigabyte_peaks_below_1_3_of_its_bytes(run_python):
    weight, stored, grown = peak(run_python, 128256, 4096)
    assert stored < 0.26 * weight
    assert weight + grown < 1.3 * weight
