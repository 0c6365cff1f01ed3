"""The float8 linears: rounding against a table of all float8 values, and every kernel against the kit."""

from __future__ import annotations

import pytest
import torch

from ao_core.testing import parametrize_kernel_checks
from ao_quant import float8_ops
from ao_quant.float8_ops import (
    FLOAT8,
    FLOAT8_DYNAMIC_LINEAR,
    FLOAT8_WEIGHT_LINEAR,
    dynamic_linear_reference,
    quantize_float8,
    weight_linear_reference,
)


@parametrize_kernel_checks("float8_weight_linear", "float8_dynamic_linear")
def test_kernel(check):
    check()


def float8_values():
    """All finite float8_e4m3fn from the definition: four exponent bits (bias 7), three of mantissa."""
    positive = [m / 8 * 2**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(sorted({*positive, *(-value for value in positive)}), dtype=torch.float64)


@pytest.mark.parametrize("rowwise", [True, False])
def test_activations_round_to_the_nearest_float8(rowwise):
    x = torch.randn(17, 63) * torch.logspace(-3, 3, 17)[:, None]
    codes, scale = quantize_float8(x, rowwise=rowwise)
    assert scale.shape == ((17, 1) if rowwise else (1, 1))
    largest = x.abs().amax(1, keepdim=True) if rowwise else x.abs().max()
    torch.testing.assert_close(scale, (largest / 448).expand(scale.shape))
    steps = x.double() / scale.double()
    nearest = (steps[..., None] - float8_values()).abs().amin(-1)
    assert ((codes.double() - steps).abs() <= nearest * 1.0001 + 1e-9).all()


@pytest.mark.parametrize("rowwise", [True, False])
def test_references_are_the_float64_products(rowwise):
    x, bias = torch.randn(5, 100), torch.randn(17)
    codes, scale = (torch.randn(17, 100) * 100).clamp(-448, 448).to(FLOAT8), torch.rand(17, 1)
    weight = codes.double() * scale.double()
    found = weight_linear_reference(x, codes, scale, bias)
    torch.testing.assert_close(found.double(), x.double() @ weight.t() + bias.double(), rtol=1e-5, atol=1e-4)
    x_codes, x_scale = quantize_float8(x, rowwise=rowwise)
    expected = (x_codes.double() * x_scale.double()) @ weight.t() + bias.double()
    found = dynamic_linear_reference(x, codes, scale, bias, rowwise)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("provider", [None, "torch", "reference"])
def test_zeros_stay_zero_and_nan_shows(provider):
    x = torch.zeros(3, 64)
    x[1, 5] = torch.nan
    x[2, 5] = torch.inf
    codes, scale = torch.ones(4, 64).to(FLOAT8), torch.ones(4, 1)
    rows = FLOAT8_DYNAMIC_LINEAR(x, codes, scale, None, True, provider=provider)  # noqa: FBT003
    assert (rows[0] == 0).all()
    assert not rows[1:].isfinite().any()
    out = FLOAT8_WEIGHT_LINEAR(x, codes, scale, None, provider=provider)
    assert (out[0] == 0).all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("op", [FLOAT8_WEIGHT_LINEAR, FLOAT8_DYNAMIC_LINEAR])
def test_an_input_of_another_size_is_refused(op):
    options = (True,) if op is FLOAT8_DYNAMIC_LINEAR else ()
    with pytest.raises(RuntimeError, match="64 input features was given an input \\(2, 63\\)"):
        op(torch.ones(2, 63), torch.ones(4, 64).to(FLOAT8), torch.ones(4, 1), None, *options)


def test_a_gpu_without_float8_is_named(monkeypatch):
    """The capability decides, before anything runs."""
    key = float8_ops.Key(
        torch.device("cuda"), torch.bfloat16, ((torch.Size([16, 16]), FLOAT8), None), (True,)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    (reason,) = {k.rejects(key) for k in float8_ops.KERNELS if k.op == "float8_dynamic_linear"}
    assert reason is not None
    assert "8.9" in reason
    assert "8.0" in reason
