"""Masks and scores against the definitions, in plain loops and float64."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import gaussian

import ao_core as ao
from ao_sparsity.masks import Level, least, least_of_groups, quota, violations, zeros_first
from ao_sparsity.wanda import magnitude_scores, wanda_scores


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (3, 7), (1, 17), (4, 4)])
@pytest.mark.parametrize("columns", [1, 17, 63, 100, 576])
def test_of_m_columns_the_n_largest_stay(n, m, columns):
    """A short last group of r columns keeps min(n, r)."""
    scores = gaussian(5, columns).abs()
    mask = least_of_groups(scores, n, m)
    for row in range(5):
        for start in range(0, columns, m):
            group = scores[row, start : start + m].tolist()
            kept = sorted(range(len(group)), key=lambda i: -group[i])[:n]
            expected = [index not in kept for index in range(len(group))]
            assert mask[row, start : start + m].tolist() == expected
    assert violations(torch.ones_like(scores).masked_fill(mask, 0), n, m) == 0
    if n < m <= columns:
        assert violations(torch.ones_like(scores), n, m) == 5 * (columns // m + (columns % m > n))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("columns", [1, 17, 100])
def test_unstructured_counts(sparsity, columns):
    """Per row every row loses the same number, per layer the whole does, and what stays is no less."""
    scores = gaussian(7, columns).abs()
    by_row = least(scores, Level(sparsity))
    assert by_row.sum(1).tolist() == [int(sparsity * columns + 1e-9)] * 7
    for row, mask in zip(scores, by_row, strict=True):
        assert not mask.any() or row[mask].max() <= row[~mask].min()
    whole = least(scores, Level(sparsity, per="layer"))
    assert whole.sum() == int(sparsity * 7 * columns + 1e-9)
    assert not whole.any() or scores[whole].max() <= scores[~whole].min()


def test_the_share_is_the_decimal_that_was_written():
    assert quota(0.29, 100) == 29 and quota(0.7, 10) == 7 and quota(0.5, 17) == 8
    assert math.floor(0.29 * 100) == 28  # what binary fractions make of it


@pytest.mark.parametrize("level", [Level(0.5), Level(0.5, per="layer"), Level.parse("2:4"), Level(0.3)])
def test_a_second_time_changes_nothing(level):
    """By other scores, and where other weights score nothing."""
    weight = gaussian(9, 100)
    once = weight.masked_fill(least(zeros_first(weight, weight.abs()), level), 0)
    other = gaussian(9, 100).abs()
    other[:, :50] = 0  # no input reached these
    twice = once.masked_fill(least(zeros_first(once, other), level), 0)
    assert torch.equal(once, twice)


def test_scores_are_the_papers():
    weight, x = gaussian(17, 63), gaussian(200, 63)
    squared = x.square().sum(0)
    expected = weight.double().abs() * torch.linalg.vector_norm(x.double(), dim=0)
    torch.testing.assert_close(wanda_scores(weight, squared).double(), expected, rtol=1e-5, atol=1e-6)
    old = weight.double().abs() * x.double().square().sum(0)
    found = wanda_scores(weight, squared, squared=True)
    torch.testing.assert_close(found.double(), old, rtol=1e-5, atol=1e-6)
    assert torch.equal(magnitude_scores(weight), weight.abs())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.0, "from 0 to below 1"),
        (-0.1, "from 0 to below 1"),
        ("1.5", "from 0 to below 1"),
        ("5:4", "1 <= n <= m"),
        ("0:4", "1 <= n <= m"),
        ("2:0", "1 <= n <= m"),
        ("two", "such as 0.5 or a pattern such as 2:4"),
        (True, "from 0 to below 1"),
    ],
)
def test_levels_out_of_range(value, words):
    with pytest.raises(ao.OptionError, match=words):
        Level.parse(value)
    with pytest.raises(ao.OptionError, match="per row or per layer"):
        Level(0.5, per="column")


def test_levels_from_text():
    assert Level.parse("2:4") == Level(0.5, 2, 4) and Level.parse("1:4").sparsity == 0.75
    assert str(Level.parse("4:8")) == "4:8" and str(Level.parse("0.3", "layer")) == "0.3 per layer"
