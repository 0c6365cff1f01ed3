"""A scheme that is exact on whole numbers, and models of small whole weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import ao_core as ao
from ao_core import plugins, registry
from ao_core.scheme import SCHEMES

SOURCE = registry.Source("tests", "tests", "1")


class WholeTensor(ao.QuantizedTensor):
    data_names = ("codes",)

    def dequantize(self):
        return self.codes.to(self.dtype)


@dataclass(frozen=True)
class Whole(ao.Scheme):
    """Whole numbers as int8: one byte a weight, exact for small whole weights."""

    name: ClassVar[str] = "whole"
    tensor_types = (WholeTensor,)

    largest: int = 100
    block: tuple[int, ...] = (1, 1)

    def rejects(self, weight):
        few = "it has fewer than 4 columns" if weight.shape[-1] < 4 else None
        return super().rejects(weight) or few

    def choose_qparams(self, weight):
        return {}

    def encode(self, weight, qparams):
        return weight.round().clamp(-self.largest, self.largest).to(torch.int8)

    def decode(self, codes, qparams):
        return codes.float()

    def pack(self, codes, qparams, *, dtype):
        return WholeTensor(codes, shape=codes.shape, dtype=dtype)


@dataclass(frozen=True)
class Half(Whole):
    """Another name for the same."""

    name: ClassVar[str] = "half"


@pytest.fixture(autouse=True)
def _schemes():
    plugins.load()
    for kind in (Whole, Half):
        SCHEMES.add(kind.name, kind, SOURCE)
    yield
    plugins.reset()


def whole_weights(model):
    """Parameters of small whole numbers, so that conversion is exact."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randint(-9, 10, parameter.shape, generator=generator))
    return model.eval()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(17, 17), nn.Linear(17, 5, bias=False)


def two_blocks():
    """Names: 0.q_proj, 0.k_proj, 1.q_proj, 1.k_proj, 2 (a linear of 3 columns)."""
    return whole_weights(nn.Sequential(Attention(), Attention(), nn.Linear(3, 7), nn.LayerNorm(7)))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert type(now[name]) is torch.Tensor, f"{name} was converted"
        assert torch.equal(now[name].view(torch.int32), value.view(torch.int32)), name
