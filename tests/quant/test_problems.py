"""Ops that can be measured make problems of the size that was asked for."""

from __future__ import annotations

import pytest
import torch

import ao_core as ao

OPS = [name for name, entry in ao.OPS.entries().items() if entry.item.problem is not None]


def test_there_are_some():
    assert {"int4_weight_linear", "nf4_linear", "int8_mm", "float8_dynamic_linear"} <= set(OPS)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("rows", "k", "n"), [(3, 192, 17), (1, 100, 40)])
def test_problems(name, rows, k, n):
    op = ao.OPS.get(name)
    x = torch.randn(rows, k).bfloat16()
    arguments, others = op.problem(x, n, 0), op.problem(x, n, 1)
    out = op.reference(*arguments)
    assert out.shape == (rows, n)
    assert out.double().isfinite().all()
    assert out.double().std() > 0
    assert not torch.equal(out, op.reference(*others)), "the seed changes nothing"
    assert torch.equal(out, op.reference(*op.problem(x, n, 0))), "the same seed gives another problem"
