"""The walk: which blocks it finds, what layers see, how much it holds, and what it leaves behind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from walked_models import Block, Body, batches, hooked_rows, norms_of, same_as_hooks, walk

import ao_core as ao
from ao_core.calibrate import SquaredNorm


def test_every_layer_sees_what_hooks_see():
    """In the blocks, before and after them; ragged batches; names and stages in order."""
    model, data, found, stages = Body().eval(), batches(), {}, []

    def visit(stage):
        stages.append(stage.name)
        norms_of(stage, found)

    how = walk(model, visit, data).how
    assert stages == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", ""]
    assert how == "4 blocks of blocks in turn, then 2 layers outside them"
    assert {tokens for tokens, _ in found.values()} == {7 + 9 + 11}
    same_as_hooks(model, data, found)


def test_a_block_sees_what_the_changed_blocks_before_it_give():
    model, data, found = Body().eval(), batches(), {}

    def visit(stage):
        norms_of(stage, found)
        for name in stage.layers if stage.name else ["head"]:
            stage.replace(name, stage.weight(name).round(decimals=1))

    walk(model, visit, data)
    rows = hooked_rows(model, data)  # of the model as it is now
    for name in ("blocks.0.up", "blocks.1.up", "blocks.3.up", "head"):
        expected = rows[name].double().square().sum(0)
        torch.testing.assert_close(found[name][1].double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(model.head.weight, model.head.weight.round(decimals=1))


def test_algorithms_see_what_those_before_them_did_to_the_block():
    model, data = Body().eval(), batches()
    seen = []

    def visit(stage):
        if stage.name == "blocks.1":
            first = stage.collect(SquaredNorm, ["blocks.1.down"])["blocks.1.down"][0].value
            stage.replace("blocks.1.up", stage.weight("blocks.1.up") * 2)
            stage.set(stage.module.up, "bias", stage.module.up.bias * 2)
            seen.append((first, stage.collect(SquaredNorm, ["blocks.1.down"])["blocks.1.down"][0].value))

    walk(model, visit, data)
    ((first, second),) = seen
    torch.testing.assert_close(second, 4 * first)  # relu of twice the input is twice the output


def test_groups_read_the_same_input():
    class Fan(Block):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(17, 23)

        def forward(self, x, scale=1.0):
            y = self.norm(x)
            return x + scale * self.down(
                torch.relu(self.gate(y.view(-1, 17))).view(*x.shape[:-1], -1) * self.up(y)
            )

    found = {}

    def visit(stage):
        found[stage.name] = stage.groups
        if stage.name:
            norms = stage.collect(SquaredNorm)
            assert norms[f"{stage.name}.gate"] is norms[f"{stage.name}.up"]

    walk(Body(block=Fan).eval(), visit, batches())
    assert found["blocks.2"] == [("blocks.2.gate", "blocks.2.up"), ("blocks.2.down",)]
    assert found[""] == [("before",), ("head",)]


def test_a_layer_whose_input_is_scaled():
    """Collectors see the scaled input, algorithms the divided weight; the float output stays."""
    model, data = Body().eval(), batches()
    scheme, x = ao.parse_scheme("int8-weight-only"), torch.randn(9, 17)
    before = F.linear(x, model.blocks[1].up.weight)
    scale = torch.linspace(0.5, 3, 17)

    def visit(stage):
        if stage.name == "blocks.1":
            name, weight = "blocks.1.up", stage.weight("blocks.1.up")
            plain = stage.collect(SquaredNorm)[name][0].value
            stage.scale_input(name, scale)
            torch.testing.assert_close(stage.collect(SquaredNorm)[name][0].value, plain * scale**2)
            torch.testing.assert_close(stage.weight(name), weight / scale)
            stage.replace(name, stage.weight(name) * 1.0)  # float: nothing is left of the scale
            torch.testing.assert_close(model.blocks[1].up.weight, weight)
            stage.replace(name, scheme.quantize(stage.weight(name)))

    walk(model, visit, data)
    stored = model.blocks[1].up.weight
    assert isinstance(stored, ao.InputScaledTensor)
    assert torch.equal(stored.input_scale, scale)
    torch.testing.assert_close(F.linear(x, stored), before, rtol=0.02, atol=0.02)
