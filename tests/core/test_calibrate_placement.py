"""Where blocks and activations lie while a model is walked, and what is as it was afterwards."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from walked_models import Block, Body, batches, hooked_rows, norms_of, same_as_hooks, walk

import ao_core as ao
from ao_core.calibrate import Sample, SquaredNorm
from ao_core.calibrate.placement import Placement


def test_a_sample_of_the_rows():
    sample = Sample(3, limit=50)
    for start in range(0, 1000, 100):
        sample.update(torch.arange(start, start + 100.0)[:, None].expand(-1, 3))
    rows = sample.value
    assert rows.shape == (50, 3) and sample.tokens == 1000
    assert rows.unique(dim=0).shape[0] == 50
    assert 300 < float(rows.mean()) < 700  # early and late rows alike
    assert Sample(3).value.shape == (0, 3)


def test_one_block_at_a_time_is_on_the_device(monkeypatch):
    """A stand-in for a second device: parts are counted in and out, and run only while they are in."""
    inside, most = [], set()

    @contextmanager
    def brought(self, modules):
        modules = list(modules)
        inside.append({id(module) for module in modules})
        yield
        inside.pop()

    class Checked(Block):
        def forward(self, x, scale=1.0):
            held = set().union(*inside)
            most.add(sum(id(block.norm) in held for block in model.blocks))
            assert all(id(part) in held for part in self.modules())
            return super().forward(x, scale)

    monkeypatch.setattr("ao_core.calibrate.placement.Placement.brought", brought)
    model, stages = Body(block=Checked).eval(), []
    for part in (model.before, model.head):
        part.register_forward_pre_hook(lambda part, args: stages.append(id(part) in set().union(*inside)))
    walk(model, lambda stage: stage.collect(SquaredNorm) and None, batches())
    assert most == {1}
    assert stages and all(stages)
    assert inside == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("fail", [False, True])
def test_a_model_on_the_cpu_is_walked_on_cuda(fail):
    """The same statistics; everything is on the CPU afterwards, also after an error."""
    model, data, found = Body().eval(), batches(), {}
    seen = []

    def visit(stage):
        norms_of(stage, found)
        seen.append({parameter.device.type for parameter in stage.module.parameters()})
        for name in stage.layers:
            stage.replace(name, ao.parse_scheme("int8-weight-only").quantize(stage.weight(name)))
        if fail and stage.name == "blocks.2":
            raise KeyboardInterrupt

    before = copy.deepcopy(model)
    if fail:
        with pytest.raises(KeyboardInterrupt):
            walk(model, visit, data, device="cuda")
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before.get_parameter(name))
    else:
        walk(model, visit, data, device="cuda")
        assert seen[:4] == [{"cuda"}] * 4
        rows = hooked_rows(before, data)["blocks.0.up"]
        expected = rows.double().square().sum(0)
        torch.testing.assert_close(found["blocks.0.up"][1].cpu().double(), expected, rtol=1e-5, atol=0)
        assert isinstance(model.head.weight, ao.QuantizedTensor)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_model_that_lies_in_two_places():
    model = Body()
    model.head.to("meta")
    with pytest.raises(ao.OptionError, match="parts of the model lie on the meta device"):
        walk(model, lambda stage: None, batches())


def test_float_weights_stay_trainable():
    model = Body().eval()
    model.head.weight.requires_grad_(requires_grad=False)
    walk(model, lambda stage: [stage.replace(n, stage.weight(n) * 2) for n in stage.layers], batches())
    assert model.blocks[0].up.weight.requires_grad
    assert not model.head.weight.requires_grad


def test_a_first_block_that_is_called_otherwise():
    class Model(Body):
        def forward(self, x):
            x = self.before(x)
            for index, block in enumerate(self.blocks):
                x = block(x=x) if index == 0 else block(x)
            return self.head(x)

    model, data, found = Model().eval(), batches(), {}
    assert "in different ways" in walk(model, lambda stage: norms_of(stage, found), data).how
    same_as_hooks(model, data, found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_what_was_not_written_comes_home_without_a_copy():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    homes = [layer.weight.data_ptr() for layer in model]
    before = model[0].weight.detach().clone()
    placement = Placement(model, "cuda")
    with torch.no_grad(), placement.brought(model.modules()):
        assert model[0].weight.is_cuda
        model[1].weight.fill_(3.0)
    assert [layer.weight.data_ptr() == home for layer, home in zip(model, homes, strict=True)] == [
        True,
        False,
    ]
    assert torch.equal(model[0].weight, before) and bool((model[1].weight == 3.0).all())


def moving(model):
    """A placement for which the CPU is a second device; what was copied there stays."""
    placement = Placement(model, None)
    placement.moves = True
    return placement


def test_what_was_fetched_is_taken_unless_it_was_written():
    model = Body().eval()
    block, placement = model.blocks[1], moving(model)
    homes = {name: each.data_ptr() for name, each in block.named_parameters()}
    values = {name: each.detach().clone() for name, each in block.named_parameters()}
    with torch.no_grad():
        placement.fetch(block.modules())
        block.norm.weight.fill_(3.0)  # the copy is older
        with placement.brought(block.modules()):
            there = {name: each.data_ptr() for name, each in block.named_parameters()}
    assert {name for name in homes if there[name] == homes[name]} == {"norm.weight"}
    assert bool((block.norm.weight == 3.0).all())
    for name, value in values.items():
        assert name == "norm.weight" or torch.equal(block.get_parameter(name), value)
    placement.fetch(block.modules())
    placement.settle(model)  # what nobody took is dropped
    with placement.brought(block.modules()):
        assert {name: each.data_ptr() for name, each in block.named_parameters()} == there


def test_a_block_runs_on_the_weights_of_another():
    """Those of the same names and shapes; a part that is unlike, or has buffers, is brought."""
    model = Body().eval()
    lender, block = model.blocks[0], model.blocks[1]
    block.norm = torch.nn.LayerNorm(block.norm.weight.shape[0], elementwise_affine=False)
    block.up.register_buffer("steps", torch.ones(1))
    own = dict(block.named_parameters())
    alike = {"down.weight", "down.bias"} & own.keys()
    assert alike
    with moving(model).lent(lender, block):
        for name, parameter in block.named_parameters():
            expected = lender.get_parameter(name) if name in alike else own[name]
            assert parameter is expected, name
    assert all(parameter is own[name] for name, parameter in block.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_walk_that_moves_finds_what_one_in_place_finds(tied, monkeypatch):
    """Blocks that share a tensor lend none; either way every parameter is its own afterwards."""
    model, data, found, lent = Body().eval(), batches(), {}, []
    if tied:
        model.blocks[2].norm.weight = model.blocks[1].norm.weight
    own = dict(model.named_parameters())
    real = Placement.lent
    monkeypatch.setattr(Placement, "lent", lambda self, a, b: lent.append(b) or real(self, a, b))
    init = Placement.__init__

    def moves(self, *args):
        init(self, *args)
        self.moves = True

    monkeypatch.setattr(Placement, "__init__", moves)
    walk(model, lambda stage: norms_of(stage, found), data)
    same_as_hooks(model, data, found)
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert len(lent) == (0 if tied else len(model.blocks) - 1)
