"""SparseGPT's column loop against the inverse Hessian of the paper in float64."""

from __future__ import annotations

import pytest
import torch
from small_models import gaussian, hessian_of, inputs

import ao_core as ao
from ao_core.numerics.hessian import output_error
from ao_sparsity.masks import Level, least, violations
from ao_sparsity.sparsegpt import sparsegpt
from ao_sparsity.wanda import wanda_scores


def by_the_paper(weight, hessian, level, block_size):
    """Algorithm 1: the inverse loses a row and a column a step; masks as blocks of columns are reached."""
    w, h = weight.double().clone(), hessian.double().clone()
    rows, columns = w.shape
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    step = level.m or block_size
    for j in range(columns):
        if j % step == 0:
            ahead, span, pivots = inverse.clone(), slice(j, min(j + step, columns)), []
            for k in range(j, span.stop):
                pivots.append(ahead[k, k].clone())
                ahead -= torch.outer(ahead[:, k], ahead[k]) / ahead[k, k]
            scores = w[:, span] ** 2 / torch.stack(pivots)
            mask[:, span] = least(scores, level if level.m else Level(level.sparsity, per=level.per))
        error = (w[:, j] * mask[:, j]) / inverse[j, j]
        w[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        w[mask[:, j], j] = 0
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w, mask


@pytest.mark.parametrize("level", ["2:4", "1:2", "0.5", "0.25"])
@pytest.mark.parametrize("per", ["row", "layer"])
@pytest.mark.parametrize(("rows", "columns"), [(17, 96), (5, 64), (1, 32)])
def test_each_column_is_that_of_the_paper(level, per, rows, columns):
    """Scores of the paper take the inverse of the columns that are left when the block is reached."""
    weight, hessian = gaussian(rows, columns), hessian_of(inputs(columns))
    made = Level.parse(level, per)
    found = sparsegpt(weight, hessian, made, block_size=32)
    expected, mask = by_the_paper(weight, hessian, made, 32)
    assert (found.mask == mask).double().mean() > 0.99
    if torch.equal(found.mask, mask):
        torch.testing.assert_close(found.weight.double(), expected, rtol=2e-3, atol=2e-3)
    assert not found.weight[found.mask].any()


@pytest.mark.parametrize("columns", [1, 17, 63, 100, 576])
@pytest.mark.parametrize("level", ["2:4", "0.5"])
def test_outputs_err_less_than_wandas(columns, level):
    """On inputs that it has not seen, and at the same level."""
    weight, made = gaussian(33, columns), Level.parse(level, "layer")
    x, held_back = inputs(columns, 4000), inputs(columns, 500, seed=1)
    found = sparsegpt(weight, hessian_of(x), made)
    wanda = weight.masked_fill(least(wanda_scores(weight, x.square().sum(0)), made), 0)
    if made.m:
        assert violations(found.weight, 2, 4) == 0
    else:
        assert int((found.weight == 0).sum()) == int(0.5 * weight.numel())
    expected = held_back @ weight.t()
    errors = [float((held_back @ w.t() - expected).square().sum()) for w in (found.weight, wanda)]
    if columns >= 100:  # in one short block the paper's mask is no better
        assert errors[0] < errors[1]
    whole = float(expected.square().sum())
    assert output_error(weight, found.weight, hessian_of(held_back)) == pytest.approx(
        errors[0] / whole, rel=1e-3
    )


@pytest.mark.parametrize("level", ["2:4", "0.5", "0.3"])
@pytest.mark.parametrize("per", ["row", "layer"])
def test_a_second_time_changes_nothing(level, per):
    weight, made = gaussian(33, 200), Level.parse(level, per)
    once = sparsegpt(weight, hessian_of(inputs(200)), made).weight
    again = sparsegpt(once, hessian_of(inputs(200, seed=5)), made)
    assert torch.equal(again.weight, once)


def test_columns_that_no_input_reaches_go_first_and_damping_is_raised():
    weight, x = gaussian(9, 64), inputs(64)
    x[:, [0, 20, 63]] = 0
    found = sparsegpt(weight, hessian_of(x), Level(0.25, per="row"))
    assert found.mask[:, [0, 20, 63]].all() and found.percdamp == 0.01
    short = sparsegpt(weight, hessian_of(inputs(64, tokens=3)), Level(0.5), percdamp=0.0)
    assert short.percdamp > 0 and torch.isfinite(short.weight).all()
    with pytest.raises(ao.ModelError, match="no Cholesky factor"):
        sparsegpt(weight, -hessian_of(x), Level(0.5))
