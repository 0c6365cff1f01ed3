"""The walk: which blocks it finds, what layers see, how much it holds, and what it leaves behind."""

from __future__ import annotations

import copy
import weakref
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao_core as ao
from ao_core.calibrate import Sample, SquaredNorm, Stage, Walker, find_blocks
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
