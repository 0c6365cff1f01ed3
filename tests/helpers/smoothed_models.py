"""Blocks whose inputs have outlying channels, and SmoothQuant on them."""

from __future__ import annotations

import torch
from torch import nn

import ao_core as ao
from ao_quant.smoothquant import SmoothQuant

SCHEME = "int8-dynamic"
FOLDED, EXPLICIT = "folded into ", "explicit input scale"


class RMSNorm(nn.Module):
    """``weight`` times, or with ``offset`` ``1 + weight`` times, the normalized input."""

    def __init__(self, size, offset=False):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(size) + 0.5 - float(offset)), float(offset)

    def forward(self, x):
        return (self.weight + self.offset) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    """Two linears on a norm, multiplied, and one on the product: SwiGLU, or with ``relu`` without gate."""

    def __init__(self, norm=RMSNorm, activation=nn.functional.silu, bias=False, twice=False):
        super().__init__()
        self.norm = norm(17)
        self.gate, self.up = nn.Linear(17, 23, bias=bias), nn.Linear(17, 23, bias=bias)
        self.down = nn.Linear(23, 17, bias=bias)
        self.activation, self.twice = activation, twice

    def forward(self, x):
        y = self.norm(x)
        out = self.down(self.activation(self.gate(y)) * self.up(y))
        return (y if self.twice else x) + out


def model_of(**options):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(**options) for _ in range(2)]).eval()


def outlying(rows=64, columns=17):
    """Inputs with two channels fifty times as large as the others."""
    x = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(3))
    x[..., [3, 11]] *= 50
    return [x[:1], x[1:]]


def smoothed(model, data, *, exclude=None, **options):
    """The report, and for each layer where its factors went."""
    report = ao.compress_(model, SmoothQuant(**options), data, scheme=SCHEME, exclude=exclude)
    return report, {name: note.get("smoothquant", "") for name, note in report.notes.items()}
