"""Statistics against float64, whatever the batches were cut into, and with no rows at all."""

from __future__ import annotations

import pytest
import torch

from ao_core.calibrate import Absmax, Hessian, Sample, SquaredNorm

KINDS = [Absmax, SquaredNorm, Hessian, Sample]


def rows(columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(columns)
    return (torch.randn(100, columns, generator=generator) * torch.rand(columns, generator=generator)).to(
        dtype
    )


def reference(kind, x):
    x = x.double()
    return {
        Absmax: lambda: x.abs().amax(0),
        SquaredNorm: lambda: (x * x).sum(0),
        Hessian: lambda: 2 / len(x) * x.t() @ x,  # of the squared error of one output, a token
    }[kind]()


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("columns", [1, 17, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(kind, columns, dtype):
    """Batches of any shape, some of them empty."""
    x = rows(columns, dtype)
    collector = kind(columns, "cpu")
    for part in (x[:0], x[:1], x[1:64].view(3, 21, columns), x[:0].view(0, 5, columns), x[64:]):
        collector.update(part)
    assert collector.tokens == 100
    assert collector.value.dtype == torch.float32
    torch.testing.assert_close(collector.value.double(), reference(kind, x), rtol=1e-5, atol=1e-6)


def test_the_hessian_is_that_of_the_squared_error():
    """Its quadratic form is the error of a changed weight: ``½ dᵀ H d = ‖X d‖² / n``."""
    x, d = rows(17).double(), torch.linspace(-1, 1, 17).double()
    collector = Hessian(17)
    collector.update(x)
    h = collector.value.double()
    assert float(d @ h @ d / 2) == pytest.approx(float((x @ d).square().mean()), rel=1e-5)


def test_a_late_token_counts_as_much_as_an_early_one():
    """A thousand times the same batch, then one that is ten times as large."""
    x = rows(5)
    collector = Hessian(5)
    for _ in range(1000):
        collector.update(x[:10])
    collector.update(10 * x[10:20])
    sums = 1000 * x[:10].double().t() @ x[:10].double() + 100 * x[10:20].double().t() @ x[10:20].double()
    torch.testing.assert_close(collector.value.double(), 2 * sums / 10_010, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_seen(kind):
    collector = kind(7, "cpu")
    assert collector.tokens == 0
    collector.update(torch.empty(2, 0, 7))
    assert collector.tokens == 0
    assert torch.equal(collector.value, torch.zeros_like(collector.value))
    assert collector.value.shape[-1] == 7


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_another_width(kind):
    with pytest.raises(ValueError, match=r"7 columns are collected, found \(3, 8\)"):
        kind(7).update(torch.ones(3, 8))


def test_inputs_are_kept_by_value():
    x = torch.ones(3, 2)
    sample, absmax = Sample(2), Absmax(2)
    sample.update(x)
    absmax.update(x)
    x.fill_(torch.nan)
    assert torch.equal(absmax.value, torch.ones(2))
    assert torch.equal(sample.value, torch.ones(3, 2))
