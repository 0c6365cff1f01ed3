"""Scales and codes against numpy in float64, torch.ao's observers and searches without cleverness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from number_cases import DEVICES, DTYPES, SIZES, hard_rows, make
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from ao_core.numerics import affine

EPS = np.float32(np.finfo(np.float32).eps)


def groups_of(row, size):
    return [row[start : start + size] for start in range(0, len(row), size)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("group_size", [-1, 1, 32, 100, 4096])
def test_scales_are_those_of_each_group_alone(columns, group_size, dtype, device):
    weight = hard_rows(columns, dtype, device)
    scale = affine.choose_symmetric(weight, qmin=-128, qmax=127, group_size=group_size)
    ascale, zero = affine.choose_affine(weight, qmin=0, qmax=15, group_size=group_size)
    size = columns if group_size == -1 else group_size
    for n, row in enumerate(weight.double().cpu().numpy().astype(np.float32)):
        groups = groups_of(row, size)
        assert scale.shape == ascale.shape == zero.shape == (8, len(groups))
        assert (scale.dtype, ascale.dtype, zero.dtype) == (
            torch.float32,
            torch.float32,
            torch.int32,
        )
        # CUDA divides by a constant through its reciprocal: off by an ulp at most.
        ulp = 0.0 if weight.device.type == "cpu" else 1.2e-7
        for g, group in enumerate(groups):
            expected = max(np.abs(group).max() / np.float32(127.5), EPS)
            assert scale[n, g].item() == pytest.approx(expected, rel=ulp, abs=0)
            low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
            step = max((high - low) / np.float32(15), EPS)
            assert ascale[n, g].item() == pytest.approx(step, rel=ulp, abs=0)
            if weight.device.type == "cpu":  # elsewhere an ulp decides between two at a tie
                assert zero[n, g].item() == np.clip(-np.round(low / step), 0, 15)


@pytest.mark.parametrize(("qmin", "qmax", "half"), [(-128, 127, 127.5), (-127, 127, 127), (-8, 7, 7.5)])
def test_symmetric_divides_by_half_the_width(qmin, qmax, half):
    scale = affine.choose_symmetric(torch.tensor([[3.0, -half]]), qmin=qmin, qmax=qmax)
    assert scale.tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
def test_affine_equals_the_observers(columns, dtype):
    weight = hard_rows(columns, dtype)
    whole = MinMaxObserver(torch.qint8, torch.per_tensor_affine, quant_min=-128, quant_max=127)
    each = PerChannelMinMaxObserver(0, torch.qint8, torch.per_channel_affine, quant_min=-128, quant_max=127)
    for observer, view in ((whole, weight.reshape(1, -1)), (each, weight)):
        observer(weight)
        want_scale, want_zero = observer.calculate_qparams()
        scale, zero = affine.choose_affine(view, qmin=-128, qmax=127)
        torch.testing.assert_close(scale.flatten(), want_scale, rtol=0, atol=0)
        assert zero.flatten().tolist() == want_zero.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_equals_the_observer(dtype):
    weight = make(40, 256, dtype=dtype)
    observer = PerChannelMinMaxObserver(
        0, torch.qint8, torch.per_channel_symmetric, quant_min=-8, quant_max=7, eps=float(EPS)
    )
    observer(weight)
    scale = affine.choose_symmetric(weight, qmin=-8, qmax=7)
    torch.testing.assert_close(scale.flatten(), observer.calculate_qparams()[0], rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_nearest(columns, group_size, dtype, symmetric, device):
    weight = hard_rows(columns, dtype, device)
    qmin, qmax = -128, 127
    if symmetric:
        scale = affine.choose_symmetric(weight, qmin=qmin, qmax=qmax, group_size=group_size)
        zero = None
    else:
        scale, zero = affine.choose_affine(weight, qmin=qmin, qmax=qmax, group_size=group_size)
    kept = weight.clone()
    codes = affine.quantize(weight, scale, qmin=qmin, qmax=qmax, zero_point=zero, group_size=group_size)
    assert torch.equal(weight, kept)
    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape

    back = affine.dequantize(codes, scale, zero_point=zero, group_size=group_size).double()
    step = scale.double().repeat_interleave(columns if group_size == -1 else group_size, 1)
    # A rounded zero point may shift an affine range by half a step, which is lost at one end.
    bound = 0.5 if symmetric else 1.0
    assert ((weight.double() - back).abs() <= bound * step[:, :columns] * (1 + 1e-4)).all()
    assert back[0].abs().max() == 0
    low = affine.dequantize(codes, scale, zero_point=zero, group_size=group_size, dtype=dtype)
    assert torch.equal(low, back.to(dtype))


def test_rounding_is_half_to_even():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes = affine.quantize(weight, torch.ones(1, 1), qmin=-8, qmax=7)
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2]]


def test_codes_are_clamped_into_the_dtype_asked_for():
    weight = torch.tensor([[-1e30, -torch.inf, 0.0, 7.0, torch.inf]])
    zero = torch.full((1, 1), 3, dtype=torch.int32)
    codes = affine.quantize(weight, torch.ones(1, 1), qmin=0, qmax=15, zero_point=zero, dtype=torch.uint8)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[0, 0, 3, 10, 15]]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_leading_dims_are_a_loop(lead):
    weight = make(*lead, 5, 100)
    flat = weight.reshape(-1, 5, 100)
    scale, zero = affine.choose_affine(weight, qmin=0, qmax=255, group_size=32)
    assert scale.shape == (*lead, 5, 4)
    options = {"qmin": 0, "qmax": 255, "group_size": 32, "dtype": torch.uint8}
    codes = affine.quantize(weight, scale, zero_point=zero, **options)
    for i, one in enumerate(flat):
        s, z = affine.choose_affine(one, qmin=0, qmax=255, group_size=32)
        assert torch.equal(codes.reshape(flat.shape)[i], affine.quantize(one, s, zero_point=z, **options))


def test_a_column_or_a_group_alone_gets_the_codes_it_has_in_the_whole():
    weight = make(7, 100)
    scale = affine.choose_symmetric(weight, qmin=-8, qmax=7, group_size=32)
    whole = affine.quantize(weight, scale, qmin=-8, qmax=7, group_size=32)
    back = affine.dequantize(whole, scale, group_size=32)
    for j in range(100):
        own = scale[:, j // 32 : j // 32 + 1]
        column = affine.quantize(weight[:, j : j + 1], own, qmin=-8, qmax=7, group_size=32)
        assert torch.equal(column, whole[:, j : j + 1])
        assert torch.equal(affine.dequantize(column, own, group_size=32), back[:, j : j + 1])
    for g, group in enumerate(weight.split(32, 1)):
        own = scale[:, g : g + 1]
        assert torch.equal(affine.quantize(group, own, qmin=-8, qmax=7), whole[:, 32 * g : 32 * (g + 1)])


def test_expand_groups():
    qparam = torch.tensor([[1, 2, 3]])
    assert affine.expand_groups(qparam, 7, 3).tolist() == [[1, 1, 1, 2, 2, 2, 3]]
    assert affine.expand_groups(torch.tensor([[4]]), 3).tolist() == [[4, 4, 4]]


@pytest.mark.parametrize(("columns", "group_size"), [(6, 3), (10, 3), (7, -1), (7, 0)])
def test_qparams_that_do_not_fit_are_refused(columns, group_size):
    with pytest.raises(ValueError, match="group_size they were chosen with"):
        affine.expand_groups(torch.ones(1, 3), columns, group_size)
    with pytest.raises(ValueError, match="group_size they were chosen with"):
        affine.quantize(make(1, columns), torch.ones(1, 3), qmin=-8, qmax=7, group_size=group_size)


def test_bad_arguments_of_affine():
    weight, scale = make(4, 4), torch.ones(4, 1)
    with pytest.raises(TypeError, match="int64"):
        affine.choose_symmetric(weight.long(), qmin=-8, qmax=7)
    with pytest.raises(TypeError, match="shape"):
        affine.choose_affine(torch.tensor(1.0), qmin=-8, qmax=7)
    with pytest.raises(ValueError, match="empty"):
        affine.choose_affine(weight, qmin=7, qmax=7)
    with pytest.raises(ValueError, match="got 0"):
        affine.choose_symmetric(weight, qmin=-8, qmax=7, group_size=0)
    with pytest.raises(ValueError, match="wider dtype"):
        affine.quantize(weight, scale, qmin=0, qmax=255)
    with pytest.raises(ValueError, match="column dim"):
        affine.quantize(weight[:, 0], scale, qmin=-8, qmax=7)
    with pytest.raises(ValueError, match="column dim"):
        affine.dequantize(torch.ones(4, dtype=torch.int8), scale)


def test_codes_and_scales_carry_no_graph():
    weight = make(4, 8).requires_grad_()
    scale, zero = affine.choose_affine(weight, qmin=0, qmax=15)
    codes, token = affine.quantize_per_token(weight)
    symmetric = affine.choose_symmetric(weight, qmin=-8, qmax=7)
    assert not any(t.requires_grad for t in (scale, zero, symmetric, codes, token))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 8)])
def test_affine_of_nothing(shape):
    weight = torch.empty(shape)
    scale, zero = affine.choose_affine(weight, qmin=0, qmax=15, group_size=4)
    codes = affine.quantize(weight, scale, qmin=0, qmax=15, zero_point=zero, group_size=4)
    assert codes.shape == shape
    assert affine.dequantize(codes, scale, zero_point=zero, group_size=4).shape == shape
    assert affine.choose_symmetric(weight, qmin=-8, qmax=7).shape == (*shape[:-1], 1)
