"""SQNR, bytes and zeros against the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import ao_core as ao
from ao_core.metrics import model_bytes, sparsity, sqnr, stored_bytes


class Halved(torch.Tensor):
    """A wrapper subclass that says float32 and stores int8 codes and one scale a row."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):
        return cls(inner["codes"], inner["scale"])

    def dequantize(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


def halved(rows=8, columns=16):
    codes = torch.arange(rows * columns).remainder(100).to(torch.int8).view(rows, columns)
    return Halved(codes, torch.full((rows, 1), 0.5))


# sqnr


def test_sqnr_is_twenty_log_of_the_ratio_of_norms():
    x = torch.randn(63, 17)
    y = x + 0.01 * torch.randn(63, 17)
    a, b = x.double().numpy(), y.double().numpy()
    expected = 20 * np.log10(np.linalg.norm(a) / np.linalg.norm(a - b))
    assert sqnr(x, y) == pytest.approx(expected, abs=1e-9)


def test_sqnr_of_low_precision_is_computed_in_float64():
    x = torch.full((4096,), 300.0, dtype=torch.float16)  # its squares overflow float16
    assert sqnr(x, x * 0.5) == pytest.approx(20 * math.log10(2.0))


def test_sqnr_at_the_ends():
    x = torch.randn(5)
    assert sqnr(x, x.clone()) == math.inf
    assert sqnr(torch.zeros(5), torch.zeros(5)) == math.inf
    assert sqnr(torch.zeros(5), torch.ones(5)) == -math.inf
    assert sqnr(torch.tensor([1e-40]), torch.tensor([2e-40])) == pytest.approx(0.0, abs=1e-3)


def test_sqnr_dequantizes():
    weight = halved()
    assert sqnr(weight.dequantize(), weight) == math.inf


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), "one shape"),
        (torch.ones(1), torch.ones(2), "one shape"),
        (torch.ones(0), torch.ones(0), "at least one element"),
        (torch.tensor([math.nan]), torch.ones(1), "reference"),
        (torch.ones(1), torch.tensor([math.inf]), "approximation"),
    ],
)
def test_sqnr_refuses(x, y, words):
    with pytest.raises(ValueError, match=words):
        sqnr(x, y)


# bytes


def test_stored_bytes_counts_inner_tensors():
    assert stored_bytes(halved(8, 16)) == 8 * 16 * 1 + 8 * 4
    assert stored_bytes(torch.zeros(3, 5, dtype=torch.bfloat16)) == 30
    assert stored_bytes(torch.zeros(3, 0)) == 0


def test_stored_bytes_of_a_wrapper_in_a_wrapper():
    inner = halved(8, 16)
    assert stored_bytes(Halved(inner, torch.ones(8, 1))) == 8 * 16 + 8 * 4 + 8 * 4


def test_stored_bytes_counts_shared_memory_once():
    codes = torch.zeros(8, 16, dtype=torch.int8)
    assert stored_bytes(Halved(codes, codes)) == 128
    assert stored_bytes(Halved(codes[:6], codes[4:])) == 128  # rows 4 and 5 are in both
    assert stored_bytes(Halved(codes[:2], codes[6:])) == 64
    assert stored_bytes(torch.zeros(1, 4).expand(100, 4)) == 16
    assert stored_bytes(codes.t()) == 128


@pytest.mark.filterwarnings("ignore:Sparse")
def test_stored_bytes_of_sparse_tensors():
    dense = torch.eye(10)
    assert stored_bytes(dense.to_sparse_coo()) == 10 * 4 + 2 * 10 * 8
    assert stored_bytes(dense.to_sparse_csr()) == 10 * 4 + 10 * 8 + 11 * 8


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.first = nn.Linear(8, 8, bias=True)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.first.weight
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("kept", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("cache", torch.zeros(5, dtype=torch.int8), persistent=False)


def test_model_bytes_counts_tied_weights_once_and_all_buffers():
    found = model_bytes(Tied())
    assert found.by_dtype == {"float32": 4 * (400 + 64 + 8), "float64": 24, "int8": 5}
    assert found.total == 4 * (400 + 64 + 8) + 24 + 5
    assert found.linear_weights == 4 * 64  # the head is the embedding
    assert found.linear_elements == 64


def test_model_bytes_of_quantized_weights():
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.LayerNorm(8))
    model[0].weight = nn.Parameter(halved(8, 16), requires_grad=False)
    found = model_bytes(model)
    assert found.linear_weights == 128 + 32
    assert found.linear_elements == 128
    assert found.by_dtype == {"int8": 128, "float32": 32 + 2 * 8 * 4}


def test_model_bytes_of_views_into_one_buffer():
    flat = torch.zeros(64 + 64)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].weight = nn.Parameter(flat[:64].view(8, 8))
    model[1].weight = nn.Parameter(flat[64:].view(8, 8))
    assert model_bytes(model).total == 512


def test_model_bytes_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    assert model_bytes(model).total == 2 * 16 * 16 * 4


# zeros


def test_sparsity_counts_zeros_of_linears_once():
    """Tied heads are the embedding's; quantized weights count as they dequantize."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(10, 8), nn.Linear(8, 10, bias=False), nn.Linear(10, 3), nn.Linear(10, 3)
    )
    model[1].weight = model[0].weight
    model[3].weight = model[2].weight
    assert sparsity(model) == 0
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight[:, :5] = 0
    assert sparsity(model) == 0.5
    ao.quantize_(model, "int8-weight-only", include="2")
    assert sparsity(model) == 0.5
    assert math.isnan(sparsity(nn.Sequential(nn.ReLU())))
