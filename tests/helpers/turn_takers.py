"""Algorithms that note their turns, and a model of blocks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import ao_core as ao
from ao_core.calibrate import SquaredNorm

SCHEME = "int8-weight-only"
LOG: list[tuple[str, str]] = []


@dataclass(frozen=True)
class Halve(ao.BlockAlgorithm):
    """Halves the weights it is told to, and notes what they saw."""

    name: ClassVar[str] = "halve"
    only: str = ""
    fail: str = ""

    def visit(self, stage):
        LOG.append((self.name, stage.name))
        for name, (norm,) in stage.collect(SquaredNorm).items():
            if self.only in name:
                stage.replace(name, stage.weight(name) / 2)
                stage.note(name, norm=float(norm.value.sum()))
        if self.fail and self.fail == stage.name:
            raise RuntimeError("it failed")


@dataclass(frozen=True)
class Quantize(ao.BlockAlgorithm):
    """Quantizes weights ending in ``only`` itself, with a scheme of its own."""

    name: ClassVar[str] = "quantize"
    only: str = "up"
    scheme: str | None = None

    def visit(self, stage):
        LOG.append((self.name, stage.name))
        for name in stage.layers:
            if name.endswith(self.only):
                stage.replace(name, stage.schemes[name].quantize(stage.weight(name).round(decimals=2)))

    def rejects(self, scheme):
        return "it needs a scheme" if scheme is None else None


class Alone:
    """An algorithm that walks no blocks."""

    name = "alone"

    def run(self, model, plan, batches):
        LOG.append((self.name, f"{len(batches)} batches"))
        return (
            ao.apply_(model, plan)
            if any(c.scheme for c in plan.layers.values())
            else ao.Report(plan, 1, 1, 0, 0)
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(17, 23), nn.Linear(23, 17)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def make(blocks=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 17), nn.Sequential(*[Block() for _ in range(blocks)]), nn.Linear(17, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 5, generator=generator), torch.randn(1, 5, generator=generator)]
