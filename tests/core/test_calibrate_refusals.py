"""Errors put everything back; batches of every form; what is padding, NaN or shared."""

from __future__ import annotations

import pytest
import torch
from walked_models import Body, batches, hooked_rows, norms_of, walk

import ao_core as ao
from ao_core.calibrate import SquaredNorm, Stage
from ao_core.calibrate.batches import as_batches


@pytest.mark.parametrize("stop", ["blocks.0", "blocks.2", ""])
def test_an_error_puts_everything_back(stop):
    """Weights, biases, training flags, forwards."""
    model, data = Body(), batches()
    model.blocks[1].eval()
    before = dict(model.named_parameters())
    copies = {name: parameter.detach().clone() for name, parameter in before.items()}
    modes = [module.training for module in model.modules()]

    def visit(stage):
        for name in stage.layers:
            stage.replace(name, ao.parse_scheme("int8-weight-only").quantize(stage.weight(name)))
        if stage.name:
            stage.set(stage.module.norm, "weight", stage.module.norm.weight * 3)
        if stage.name == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(model, visit, data)
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, copies[name])
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_tried_change_is_undone_alone():
    model, data = Body().eval(), batches()
    first = model.blocks[0].up.weight.detach().clone()

    def visit(stage):
        if stage.name == "blocks.0":
            stage.replace("blocks.0.up", stage.weight("blocks.0.up") * 2)
            mark = stage.mark()
            stage.replace("blocks.0.up", stage.weight("blocks.0.up") * 5)
            stage.restore(mark)

    walk(model, visit, data)
    assert torch.equal(model.blocks[0].up.weight, first * 2)


def test_nan_in_the_activations_is_named():
    model = Body().eval()
    model.blocks[2].norm.bias.data[3] = torch.nan
    with pytest.raises(ao.ModelError, match=r"'blocks.2.up' saw NaN"):
        walk(model, lambda stage: stage.collect(SquaredNorm) and None, batches())


def test_padding_is_not_counted():
    """An ``attention_mask`` in the batch says which positions are tokens."""

    class Model(Body):
        def forward(self, x, attention_mask):
            return super().forward(x)

    model, found = Model().eval(), {}
    x = torch.randn(2, 6, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    walk(model, lambda stage: norms_of(stage, found), [{"x": x, "attention_mask": mask}])
    rows = hooked_rows(model, [x], run=lambda batch: model(batch, mask))
    for name, (tokens, value) in found.items():
        assert tokens == 8
        kept = rows[name].double()[mask.flatten().bool()]
        torch.testing.assert_close(value.double(), kept.square().sum(0), rtol=1e-5, atol=0)


def test_batches_of_every_form():
    x = torch.randn(1, 4, 5)
    assert as_batches(iter([x, (x,), [x], {"x": x}])) == [x, (x,), [x], {"x": x}]
    totals = []
    for batch in (x, (x,), [x], {"x": x}):
        found = {}
        walk(Body().eval(), lambda stage, found=found: norms_of(stage, found), [batch])
        totals.append(found["blocks.3.down"][1])
    assert all(torch.equal(total, totals[0]) for total in totals)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "the list of batches is empty"),
        (iter(()), "the list of batches is empty"),
        (torch.ones(2, 3), "is one Tensor: put it in a list"),
        ({"x": torch.ones(1)}, "is one dict: put it in a list"),
        ([torch.ones(1), 3], "batch 1 is a int"),
    ],
)
def test_batches_that_are_none(given, words):
    with pytest.raises(ao.OptionError, match=words):
        as_batches(given)


def test_a_shared_module_is_not_owned_by_a_block():
    class Model(Body):
        def __init__(self):
            super().__init__()
            for block in self.blocks:
                block.norm = self.blocks[0].norm
            self.blocks[1].down.weight = self.blocks[0].down.weight

    owned, seen = {}, {}

    def visit(stage: Stage):
        for name in stage.layers:
            seen[name] = stage.name
        if stage.name:
            owned[stage.name] = [stage.owns(stage.module.norm.weight), stage.owns(stage.module.up.weight)]
            owned[stage.name].append(stage.owns(stage.module.down.weight))

    walk(Model().eval(), visit, batches())
    assert owned["blocks.1"] == [False, True, False]
    assert owned["blocks.2"] == [False, True, True]
    assert seen["blocks.0.down"] == ""  # two blocks hold it, so that it belongs to neither
