"""The 4-bit linears against float64, each kind of zero point by hand, and every kernel against the kit."""

from __future__ import annotations

import pytest
import torch

from ao_core.numerics import affine, pack
from ao_core.testing import parametrize_kernel_checks
from ao_quant import decoded
from ao_quant.int4_ops import (
    INT4_WEIGHT_LINEAR,
    INT8_DYNAMIC_INT4_LINEAR,
    dequantize_int4,
    dynamic_linear_reference,
    quantize_token,
    weight_linear_torch,
)


@parametrize_kernel_checks("int4_weight_linear", "int8_dynamic_int4_linear")
def test_kernel(check):
    check()


def packed_by_hand(codes):
    """Even columns in the low four bits, written with Python integers."""
    rows = [[*row, 0] if len(row) % 2 else row for row in codes.tolist()]
    data = [[low + 16 * high for low, high in zip(row[::2], row[1::2], strict=True)] for row in rows]
    return torch.tensor(data, dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["middle", "float", "integer"])
def test_dequantize_says_what_the_zero_means(kind):
    """Three rows, five columns in groups of two: the last group is a single column."""
    codes = torch.arange(15).view(3, 5).to(torch.uint8)
    scale = torch.tensor([[0.5, 1.0, 2.0], [4.0, 0.25, 1.0], [1.0, 1.0, 8.0]])
    zero = {
        "middle": None,
        "float": torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 3.0], [0.25, 0.5, -4.0]]),
        "integer": torch.tensor([[0, 15, 7], [8, 3, 1], [2, 9, 4]], dtype=torch.uint8),
    }[kind]
    found = dequantize_int4(
        packed_by_hand(codes), scale.bfloat16(), zero, columns=5, group_size=2, dtype=torch.float32
    )
    for row in range(3):
        for column in range(5):
            q, s = int(codes[row, column]), float(scale[row, column // 2])
            z = None if zero is None else zero[row, column // 2].item()
            expected = (q - z) * s if kind == "integer" else (q - 8) * s + (z or 0)
            assert found[row, column].item() == expected


def test_dequantize_keeps_leading_dimensions():
    codes = torch.randint(0, 16, (2, 3, 5, 7), dtype=torch.uint8)
    scale, zero = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 5, 4)
    packed = pack.pack(codes, bits=4)
    whole = dequantize_int4(packed, scale, zero, columns=7, group_size=2, dtype=torch.bfloat16)
    assert whole.shape == codes.shape
    assert whole.dtype == torch.bfloat16
    one = dequantize_int4(
        packed[1, 2], scale[1, 2], zero[1, 2], columns=7, group_size=2, dtype=torch.bfloat16
    )
    assert torch.equal(whole[1, 2], one)


def test_token_steps_are_whole_and_close():
    """Off by half a step at most; also for rows of one sign, of zeros, and with an outlier."""
    x = torch.randn(6, 100)
    x[0], x[1], x[2] = x[0].abs() + 3, -x[1].abs() - 3, 0
    x[3, 5] = 1e4
    steps, scale = quantize_token(x)
    assert torch.equal(steps, steps.round())
    assert steps.abs().max() <= 255
    assert ((steps.double() * scale.double() - x.double()).abs() <= scale.double() * 0.5001).all()
    assert (steps[2] == 0).all()


def test_dynamic_reference_is_the_float64_product_of_what_is_stored():
    x = torch.randn(5, 100)
    codes = torch.randint(0, 16, (17, 100), dtype=torch.uint8)
    scale, bias = torch.rand(17, 4).bfloat16(), torch.randn(17)
    x_scale, x_zero = affine.choose_affine(x, qmin=-128, qmax=127)
    x_codes = affine.quantize(x, x_scale, zero_point=x_zero, qmin=-128, qmax=127)
    left = (x_codes.double() - x_zero) * x_scale.double()
    right = (codes.double() - 8) * scale.double().repeat_interleave(32, 1)[:, :100]
    found = dynamic_linear_reference(x, pack.pack(codes, bits=4), scale, bias, 32)
    torch.testing.assert_close(found.double(), left @ right.t() + bias.double(), rtol=1e-5, atol=1e-5)


def test_float16_does_not_overflow():
    """The codes' own sum is 255 * 7 * 576, far past 65504."""
    x = torch.full((2, 576), 0.01, dtype=torch.float16)
    packed = torch.full((3, 288), 0xFF, dtype=torch.uint8)
    out = INT8_DYNAMIC_INT4_LINEAR(x, packed, torch.ones(3, 9), None, 64)
    torch.testing.assert_close(out, torch.full((2, 3), 0.01 * 7 * 576).half(), rtol=2e-3, atol=0)


def test_weights_decoded_in_parts_give_the_same(monkeypatch):
    x = torch.randn(3, 100)
    packed = torch.randint(0, 256, (17, 50), dtype=torch.uint8)
    scale, zero, bias = torch.rand(17, 4), torch.randint(0, 16, (17, 4), dtype=torch.uint8), torch.randn(17)
    whole = weight_linear_torch(x, packed, scale, zero, bias, 32)
    monkeypatch.setattr(decoded, "_ELEMENTS", 500)  # five rows at a time
    torch.testing.assert_close(weight_linear_torch(x, packed, scale, zero, bias, 32), whole)


@pytest.mark.parametrize("provider", [None, "torch", "reference"])
def test_an_input_of_another_size_is_refused(provider):
    packed, scale = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1)
    with pytest.raises(RuntimeError, match="63 or 64 input features was given an input \\(2, 62\\)"):
        INT4_WEIGHT_LINEAR(torch.ones(2, 62), packed, scale, None, None, -1, provider=provider)
