"""GPTQ's column loop against the inverse Hessian of the paper, and the algorithm on models."""

from __future__ import annotations

import pytest
import torch
from gptq_cases import gptq
from small_models import gaussian, hessian_of, inputs

import ao_core as ao
from ao_core.numerics.hessian import inverse_factor, output_error

SCHEMES = [
    "int4-weight-only:group_size=32",
    "int4-weight-only:group_size=64,zero_point=integer",
    "int4-weight-only:group_size=-1,zero_point=None",
    "int8-weight-only:group_size=10",
    "int8-dynamic-int4-weight",
    "nf4",
    "float8-weight-only",
    "uint4",
    "ternary",
]


def by_the_paper(weight, hessian, scheme, percdamp, act_order):
    """Equations 2 and 3 in float64: after each column its row and column leave the inverse."""
    w, h = weight.double().clone(), hessian.double().clone()
    columns = w.shape[1]
    dead = h.diagonal() == 0
    h.diagonal()[dead] = h.diagonal()[~dead].mean()
    size = columns if scheme.group_columns == -1 else min(scheme.group_columns, columns)
    order = h.diagonal().argsort(descending=True, stable=True).tolist() if act_order else range(columns)
    h.diagonal().add_(percdamp * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    qparams = scheme.choose_qparams(weight)
    decoded = torch.zeros_like(w)
    for step, column in enumerate(order):
        group = column // size
        if not act_order and column % size == 0:
            fresh = scheme.choose_qparams(w[:, column : column + size].to(weight.dtype))
            for name, value in fresh.items():
                qparams[name][:, group] = value[:, 0]
        own = {name: value[:, group : group + 1] for name, value in qparams.items()}
        value = w[:, column : column + 1].float()
        decoded[:, column] = scheme.decode(scheme.encode(value, own), own)[:, 0].double()
        error = (w[:, column] - decoded[:, column]) / inverse[column, column]
        later = list(order[step + 1 :])
        w[:, later] -= error[:, None] * inverse[column, later]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return decoded


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(17, 100), (5, 63), (3, 1), (1, 17)])
def test_each_column_is_that_of_the_paper(scheme, act_order, rows, columns):
    """To the last code but for the few that lie between two, where float32 and float64 part."""
    made = ao.parse_scheme(scheme)
    weight, hessian = gaussian(rows, columns), hessian_of(inputs(columns))
    found = gptq(weight, hessian, made, block_size=24, act_order=act_order)
    expected = by_the_paper(weight, hessian, made, 0.01, act_order)
    decoded = made.decode(found.codes, found.qparams).double()
    assert decoded.shape == weight.shape
    assert ao.sqnr(expected, decoded) > 30
    # The largest weight of an int8 row lies between two codes: of three weights it is a third.
    near = 2e-3 if weight.numel() > 10 else 1e-2
    same = (decoded - expected).abs() <= near * expected.abs().amax()
    assert same.double().mean() > 0.97


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_err_less_than_by_rounding(scheme):
    """On inputs it has not seen; and what is stored is what was found."""
    made, weight = ao.parse_scheme(scheme), gaussian(33, 576)
    x, held_back = inputs(576, 4000), inputs(576, 500, seed=1)
    found = gptq(weight, hessian_of(x), made)
    stored = made.assemble(found.codes, found.qparams, dtype=weight.dtype)
    assert stored.scheme == str(made)
    expected = held_back @ weight.t()

    def error(quantized):
        return float((held_back @ quantized.t() - expected).norm() / expected.norm())

    rounded = made.quantize(weight).dequantize()
    assert error(stored.dequantize()) < 0.95 * error(rounded)
    decoded = made.decode(found.codes, found.qparams)
    assert ao.sqnr(decoded, stored.dequantize()) > 40
    direct = (held_back.double() @ (decoded - weight).double().t()).square().sum()
    relative = direct / (held_back.double() @ weight.double().t()).square().sum()
    assert output_error(weight, decoded, hessian_of(held_back)) == pytest.approx(float(relative), rel=1e-3)


@pytest.mark.parametrize("block_size", [1, 7, 64, 128, 1000])
@pytest.mark.parametrize("scheme", [f"int4-weight-only:group_size={size}" for size in (32, 256, -1)])
def test_blocks_change_nothing(scheme, block_size):
    """Lazy updates are only another order of the same sums."""
    made, weight, hessian = ao.parse_scheme(scheme), gaussian(17, 300), hessian_of(inputs(300))
    whole = gptq(weight, hessian, made, block_size=300)
    found = gptq(weight, hessian, made, block_size=block_size)
    assert (found.codes == whole.codes).double().mean() > 0.98


def test_the_factor_is_that_of_the_inverse_and_damping_is_raised_where_it_fails():
    hessian = hessian_of(inputs(63))
    factor, percdamp = inverse_factor(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(63)
    torch.testing.assert_close((factor.t() @ factor).double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-4)
    assert percdamp == 0.01 and torch.equal(factor, factor.triu())
    one = hessian_of(inputs(63, tokens=3))  # of rank 3
    factor, percdamp = inverse_factor(one, 0.0)
    assert percdamp > 0 and torch.isfinite(factor).all()
    with pytest.raises(ao.ModelError, match=r"\(63, 63\) has no Cholesky factor"):
        inverse_factor(-hessian, 0.01)


def test_columns_that_no_input_reaches_are_rounded():
    made, weight, x = ao.parse_scheme("int8-weight-only"), gaussian(17, 100), inputs(100)
    x[:, [0, 50, 99]] = 0
    found = gptq(weight, hessian_of(x), made, static_groups=True)
    rounded = made.encode(weight, made.choose_qparams(weight))
    for column in (0, 50, 99):
        assert torch.equal(found.codes[:, column], rounded[:, column])
    assert not torch.equal(found.codes, rounded)
    nothing = gptq(weight, torch.zeros(100, 100), made)
    assert torch.equal(nothing.codes, rounded)
