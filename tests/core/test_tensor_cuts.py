"""Rows, splits and transposes of quantized weights, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensor_kinds import K, N, RowTensor, StepTensor, row_tensor, step_tensor, whole
from torch import nn

from ao_core.tensor import TransposedWeight

ROWS = [slice(3, 9), slice(None, 5), slice(-4, None), slice(0, N, 3), slice(5, 5), slice(20, 30)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("make", [step_tensor, row_tensor])
def test_slices_of_rows(make, rows):
    """Equal to slices of the values, and views: no code is copied."""
    weight = make(N, K)
    part = weight[rows]
    assert type(part) is type(weight)
    assert torch.equal(part.dequantize(), weight.dequantize()[rows])
    if part.numel():
        assert part.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()
        assert torch.equal(F.linear(whole(3, K), part), F.linear(whole(3, K), weight)[:, rows])


def test_cuts_of_a_stack():
    """``[E, N, K]``: experts by index, rows of all experts."""
    weight = row_tensor(3, N, K)
    values = weight.dequantize()
    for part, expected in (
        (weight[1], values[1]),
        (weight[-1], values[-1]),
        (weight[1:], values[1:]),
        (weight[:, 2:7], values[:, 2:7]),
        (weight[2][4:], values[2][4:]),
    ):
        assert torch.equal(part.dequantize(), expected)
    assert torch.equal(weight.mT.dequantize(), values.mT)
    for dims in ((0, 1), (0, 2)):
        with pytest.raises(NotImplementedError, match="transposition"):
            weight.transpose(*dims)
    assert torch.equal(weight.permute(0, 2, -2).dequantize(), values.mT)
    with pytest.raises(NotImplementedError, match="permutation"):
        weight.permute(2, 1, 0)


@pytest.mark.parametrize("sizes", [5, 1, N, 100, [3, 4, 10], [N], [0, N]])
def test_split(sizes):
    weight = row_tensor(N, K)
    parts, expected = torch.split(weight, sizes), torch.split(weight.dequantize(), sizes)
    assert [part.shape for part in parts] == [part.shape for part in expected]
    assert all(torch.equal(a.dequantize(), b) for a, b in zip(parts, expected, strict=True))


def test_chunk():
    parts = step_tensor(N, K).chunk(3)
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), step_tensor(N, K).dequantize())


@pytest.mark.parametrize("sizes", [[3, 4], [10, 10], [-1, 18], 0, -3])
def test_a_split_that_does_not_add_up(sizes):
    with pytest.raises((ValueError, RuntimeError)):
        torch.split(step_tensor(N, K), sizes)


@pytest.mark.parametrize(
    "cut", [lambda w: w[:, 1:], lambda w: w[:, 0], lambda w: w[0], lambda w: w.split(7, dim=1)]
)
def test_other_cuts_are_refused_by_name(cut):
    with pytest.raises(NotImplementedError, match="StepTensor"):
        cut(step_tensor(N, K))


def test_a_whole_slice_of_any_dimension_is_the_weight():
    weight = step_tensor(N, K)
    for same in (weight[:], weight[:, :], weight[..., :]):
        assert torch.equal(same.codes, weight.codes)


def test_rows_cannot_be_cut_where_a_stored_tensor_lacks_them():
    """A tensor whose row_data are wrong says so instead of giving nonsense."""
    codes = step_tensor(N, K).codes
    weight = RowTensor(codes, torch.ones(1, 1), shape=(N, K), dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"'scale' is \(1, 1\) for a weight"):
        weight[3:]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_embedding(shape):
    """``F.embedding`` and ``nn.Embedding`` dequantize the rows that are asked for, and no other."""
    weight = row_tensor(N, K)
    indices = torch.randint(0, N, shape, generator=torch.Generator().manual_seed(0))
    expected = weight.dequantize()[indices]
    assert torch.equal(F.embedding(indices, weight), expected)
    module = nn.Embedding(N, K, padding_idx=2)
    module.weight = nn.Parameter(weight, requires_grad=False)
    assert torch.equal(module(indices), expected)
    assert torch.equal(module(indices.int()), expected)


def test_transposed_twice_is_the_weight():
    weight = step_tensor(N, K)
    turned = weight.t()
    assert isinstance(turned, TransposedWeight)
    assert turned.shape == (K, N)
    assert torch.equal(turned.dequantize(), weight.dequantize().t())
    for back in (turned.t(), turned.T, turned.mT, turned.transpose(0, 1), turned.permute(1, 0)):
        assert type(back) is StepTensor
        assert back.codes.data_ptr() == weight.codes.data_ptr()
    halved = turned.half()
    assert halved.dequantize().dtype == halved.t().dequantize().dtype == torch.float16


def test_a_transposed_square_weight_is_not_cut_the_wrong_way():
    """Its rows are the base's columns, which have the same size here."""
    turned = row_tensor(N, N).t()
    for cut in (lambda: turned[3:9], lambda: turned.split(5), lambda: F.embedding(torch.tensor([1]), turned)):
        with pytest.raises(NotImplementedError, match="TransposedWeight"):
            cut()
