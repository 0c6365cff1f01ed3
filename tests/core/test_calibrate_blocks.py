"""Blocks of every kind: what is handed from one to the next, and models that have none."""

from __future__ import annotations

import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn
from walked_models import Block, Body, batches, hooked_rows, norms_of, same_as_hooks, walk

from ao_core.calibrate import SquaredNorm, find_blocks


class Live(Block):
    """Counts results of blocks that are alive at the same time."""

    refs: ClassVar[list] = []
    most: ClassVar[int] = 0

    def forward(self, x, scale=1.0):
        out = super().forward(x, scale)
        Live.refs = [ref for ref in Live.refs if ref() is not None] + [weakref.ref(out)]
        Live.most = max(Live.most, len(Live.refs))
        return out


def test_one_list_of_activations_is_held():
    """However many blocks there are: one result for each batch, and the one being made."""
    most = {}
    for blocks in (2, 9):
        model, count = Body(blocks=blocks, block=Live).eval(), 8
        Live.most = 0
        walk(model, lambda stage: stage.collect(SquaredNorm) and None, batches(count))
        most[blocks] = Live.most
        assert Live.most <= count + 2
    assert most[2] == most[9]


def test_masks_that_batches_share_are_held_once():
    from ao_core.calibrate.blocks import find_chain
    from ao_core.calibrate.inputs import capture
    from ao_core.calibrate.placement import Placement

    class Masked(Body):
        def forward(self, x):
            x = self.before(x)
            mask = x[0, :, :1].sign().expand(-1, 17) if x.shape[0] == 2 else torch.ones(x.shape[1], 17)
            for block in self.blocks:
                x = block(x, scale=mask)
            return x

    model, data = Masked().eval(), [torch.randn(b, t, 5) for b, t in ((1, 7), (1, 7), (1, 9), (1, 7), (2, 7))]
    placement = Placement(model, None)
    with torch.no_grad():
        blocks = find_blocks(model)
        stream = capture(model, blocks, find_chain(model, blocks, data[0], placement), data, placement)
    masks = [kwargs["scale"] for _, kwargs in stream.others[3]]
    assert len({mask.data_ptr() for mask in masks}) == 3
    assert masks[0] is masks[1] is masks[3]
    assert [mask.shape[0] for mask in masks] == [7, 7, 9, 7, 7]
    assert torch.equal(masks[4], model.before(data[4]).detach()[0, :, :1].sign().expand(-1, 17))


def test_blocks_that_change_their_input_in_place():
    class Inplace(Block):
        def forward(self, x, scale=1.0):
            x += super().forward(x, scale)
            return x

    model, data, found = Body(block=Inplace).eval(), batches(), {}
    how = walk(model, lambda stage: [norms_of(stage, found) for _ in range(2)], data).how
    assert how.startswith("4 blocks")
    same_as_hooks(model, data, found)


def test_a_result_that_is_changed_between_blocks():
    class Model(Body):
        def forward(self, x):
            x = self.before(x)
            for block in self.blocks:
                x = block(x)
                x += 1
            return self.head(x)

    model, data, found = Model().eval(), batches(), {}
    how = walk(model, lambda stage: norms_of(stage, found), data).how
    assert "blocks.1 does not take what the block before it returned" in how
    same_as_hooks(model, data, found)


def plain_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 17), nn.ReLU(), nn.Linear(17, 3))


class Twice(Body):
    def forward(self, x):
        x = self.before(x)
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.head(x)


class Skips(Body):
    """A block that takes the sum of two results before it."""

    def forward(self, x):
        x = older = self.before(x)
        for block in self.blocks:
            x, older = block(x + older), x
        return self.head(x)


class Leaks(Body):
    """The second value of a block goes into the next."""

    class Block(Block):
        def forward(self, x, scale=1.0):
            return super().forward(x), torch.ones(1) * scale

    def __init__(self):
        super().__init__(block=Leaks.Block)

    def forward(self, x):
        x, scale = self.before(x), 1.0
        for block in self.blocks:
            x, scale = block(x, scale)
        return self.head(x)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = Body(), Body(blocks=2)

    def forward(self, x):
        return self.left(x) + self.right(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (plain_mlp, "Sequential has no list of repeated blocks"),
        (Twice, "blocks.0 to blocks.3 are not called once each, in order"),
        (Skips, "does not take what the block before it returned"),
        (Leaks, "takes more than the result of the block before it"),
        (Towers, "Towers has more than one stack of blocks: left.blocks, right.blocks"),
    ],
)
def test_what_can_t_be_walked_is_taken_at_once(make, reason):
    """With the reason, and with the same statistics that hooks give."""
    model, data, found, stages = make().eval(), batches(), {}, []

    def visit(stage):
        stages.append(stage.name)
        norms_of(stage, found)

    how = walk(model, visit, data).how
    assert how.startswith("the whole model at once: ") and reason in how
    assert stages == [""]
    same_as_hooks(model, data, found)


def test_blocks_that_return_tuples():
    class Pair(Block):
        def forward(self, x, scale=1.0):
            return super().forward(x, scale), torch.zeros(3)

    class Model(Body):
        def forward(self, x):
            x = self.before(x)
            for block in self.blocks:
                x = block(x)[0]
            return self.head(x)

    model, data, found = Model(block=Pair).eval(), batches(), {}
    assert walk(model, lambda stage: norms_of(stage, found), data).how.startswith("4 blocks")
    same_as_hooks(model, data, found)


def test_each_block_keeps_its_own_arguments():
    """Masks and positions that differ from block to block."""

    class Model(Body):
        def forward(self, x):
            x = self.before(x)
            for index, block in enumerate(self.blocks):
                x = block(x, scale=torch.full((17,), 1.0 + index))
            return self.head(x)

    model, data, found = Model().eval(), batches(), {}
    walk(model, lambda stage: norms_of(stage, found), data)
    same_as_hooks(model, data, found)


def test_torch_s_encoder_layers_take_no_short_cut():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model, data, found = nn.TransformerEncoder(layer, 3).eval(), [torch.randn(2, 5, 16)], {}
    assert torch.backends.mha.get_fastpath_enabled()
    walk(model, lambda stage: norms_of(stage, found), data)
    assert torch.backends.mha.get_fastpath_enabled()
    rows = hooked_rows(model, data)
    assert set(found) == {f"layers.{index}.linear{n}" for index in range(3) for n in (1, 2)}
    for name, (tokens, value) in found.items():
        assert tokens == 10
        torch.testing.assert_close(value.double(), rows[name].double().square().sum(0), rtol=1e-5, atol=0)


def test_torch_s_encoder_with_padding():
    """Its own short cut would hand the layers a nested tensor."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model, found = nn.TransformerEncoder(layer, 3).eval(), {}
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    how = walk(model, lambda s: norms_of(s, found), [{"src": x, "src_key_padding_mask": padding}]).how
    assert how == "3 blocks of layers in turn"
    assert {tokens for tokens, _ in found.values()} == {10}
