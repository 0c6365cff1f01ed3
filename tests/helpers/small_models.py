"""A small gated model, its inputs, and their Hessian: for tests of what is calibrated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def inputs(columns: int, tokens: int = 700, seed: int = 0) -> torch.Tensor:
    """Correlated columns, as activations are; another seed gives other tokens of the same kind."""
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    rows = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return rows @ (mix + torch.eye(columns) / 2)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.t() @ x / len(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.gate, self.down = nn.Linear(64, 100), nn.Linear(64, 100), nn.Linear(100, 64)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def model_of(blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(blocks)]).eval()


def data(batches: int = 3) -> list[torch.Tensor]:
    return [inputs(64, 400, seed).view(4, 100, 64) for seed in range(batches)]
