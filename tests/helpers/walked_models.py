"""Models to walk block by block, and algorithms that note what they see."""

from __future__ import annotations

import torch
from torch import nn

from ao_core.calibrate import SquaredNorm, Walker
from ao_core.calibrate.batches import as_batches
from ao_core.layers import find_layers


class Block(nn.Module):
    """A residual block that counts its calls."""

    def __init__(self, size=17, hidden=23):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, hidden), nn.Linear(hidden, size)

    def forward(self, x, scale=1.0):
        return x + scale * self.down(torch.relu(self.up(self.norm(x))))


class Body(nn.Module):
    """An embedding, blocks and a head."""

    def __init__(self, blocks=4, block=Block):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(5, 17)
        self.blocks = nn.ModuleList([block() for _ in range(blocks)])
        self.head = nn.Linear(17, 3)

    def forward(self, x):
        x = self.before(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


def batches(count=3, seed=1):
    """Ragged batches of inputs ``[1, t, 5]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 7 + 2 * index, 5, generator=generator) for index in range(count)]


def walk(model, visit, data, *, scheme=None, device=None):
    """Walk with all linears as layers; returns the walk."""
    layers = {n: it for n, it in find_layers(model).replaceable.items() if it.kind in ("linear", "experts")}
    return Walker(model, layers, dict.fromkeys(layers, scheme), as_batches(data), device=device).walk(visit)


def hooked_rows(model, data, run=None):
    """Layer → all rows that its ``nn.Linear`` is given, by ordinary hooks."""
    rows, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows[name] = []
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, name=name: rows[name].append(args[0].reshape(-1, m.in_features))
                )
            )
    with torch.no_grad():
        for batch in data:
            (run or model)(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(seen) if seen else None for name, seen in rows.items()}


def same_as_hooks(model, data, found):
    """Whether ``found`` (layer → tokens, sums of squares) is what ordinary hooks see."""
    expected = hooked_rows(model, data)
    assert set(found) == set(expected)
    for name, rows in expected.items():
        assert found[name][0] == rows.shape[0]
        torch.testing.assert_close(found[name][1].double(), rows.double().square().sum(0), rtol=1e-5, atol=0)


def norms_of(stage, found):
    for name, (norm,) in stage.collect(SquaredNorm).items():
        found[name] = (norm.tokens, norm.value)
