"""Activations to int8 against numpy, one scale a token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from number_cases import DEVICES, DTYPES, SIZES, hard_rows, make

from ao_core.numerics import affine


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("lead", [(), (1,), (17,), (2, 3)])
def test_per_token_is_exact(lead, columns, dtype, device):
    x = make(*lead, columns, dtype=dtype, device=device)
    codes, scale = affine.quantize_per_token(x)
    assert (codes.dtype, codes.shape) == (torch.int8, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (*lead, 1))
    exact = x.double().cpu().numpy().astype(np.float32)
    want = np.maximum(np.abs(exact).max(-1, keepdims=True), np.float32(1e-5)) / np.float32(127)
    found = scale.cpu().numpy()
    if device == "cpu":
        assert np.array_equal(found, want)
    else:  # CUDA divides by a constant through its reciprocal
        np.testing.assert_allclose(found, want, rtol=1.2e-7)
    assert np.array_equal(codes.cpu().numpy(), np.round(exact / found).astype(np.int8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token_on_hard_rows(dtype):
    x = hard_rows(576, dtype)
    codes, scale = affine.quantize_per_token(x)
    assert codes.abs().max() == 127
    assert codes[0].abs().max() == 0
    assert (codes[1] == -127).all()
    assert codes[2, 0] == 127
    assert codes[2, 1:].abs().max() <= 1
    assert ((codes.double() * scale - x).abs() <= 0.5 * scale * (1 + 1e-5)).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_per_token_of_nothing(shape):
    codes, scale = affine.quantize_per_token(torch.empty(shape, dtype=torch.bfloat16))
    assert (codes.shape, codes.dtype) == (shape, torch.int8)
    assert (scale.shape, scale.dtype) == ((*shape[:-1], 1), torch.float32)
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_per_token_does_not_hide_what_is_not_finite(bad):
    x = make(3, 17)
    x[1, 5] = bad
    codes, scale = affine.quantize_per_token(x)
    assert torch.isfinite(scale.flatten()).tolist() == [True, False, True]
    assert not torch.isfinite(codes[1] * scale[1]).any()


def test_bad_arguments_of_per_token():
    with pytest.raises(ValueError, match="too small"):
        affine.quantize_per_token(make(2, 2), eps=0)
    with pytest.raises(TypeError, match="float"):
        affine.quantize_per_token(torch.ones(2, 2, dtype=torch.int8))
    assert affine.quantize_per_token(torch.full((1, 3), 1e-20), eps=1e-30)[0].tolist() == [[127] * 3]
