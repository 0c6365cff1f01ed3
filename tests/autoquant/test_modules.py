"""Stacks of experts and embeddings: measured by running the module that holds them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ao_core as ao
from ao_autoquant import Budget, autoquant, explore
from ao_autoquant import sensitivity as module
from ao_autoquant.profile import profile

OPTIONS = {"schemes": ["int8-weight-only", "uint4"], "isolate": False}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 48, 32) / 6)
        self.down = nn.Parameter(torch.randn(4, 32, 48) / 7)

    def forward(self, x, index):
        out = torch.zeros_like(x)
        for number in range(4):
            rows = index == number
            out[rows] = nn.functional.linear(
                nn.functional.linear(x[rows], self.up[number]).relu(), self.down[number]
            )
        return out


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.experts, self.head = nn.Embedding(40, 32), Experts(), nn.Linear(32, 40)

    def forward(self, ids):
        x = self.embed(ids)
        return 3 * self.head(x + self.experts(x.flatten(0, 1), ids.flatten() % 4).view(x.shape))


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    return Mixture().eval(), torch.randint(0, 40, (8, 16))


def changed(model, name, scheme):
    """A copy whose one weight is what the scheme decodes to."""
    found = copy.deepcopy(model)
    layer = ao.find_layers(found).replaceable[name]
    with torch.no_grad():
        layer.weight.copy_(ao.parse_scheme(scheme).quantize(layer.weight).dequantize())
    return found


@torch.no_grad()
def test_errors_and_bytes_of_stacks_and_embeddings(mixture):
    model, ids = mixture
    found = explore(model, [ids, ids[:1, :3]], weights=[1, 5], **OPTIONS)
    assert set(found.options) == {"embed", "experts.up", "experts.down", "head"}
    assert found.calls["experts.up"] == {128: 1.0, 3: 5.0} and found.calls["embed"] == {128: 1.0, 3: 5.0}
    x = model.embed(torch.cat([ids.flatten(), ids[0, :3]]))
    index = torch.cat([ids.flatten(), ids[0, :3]]) % 4
    for name in ("experts.up", "experts.down", "embed"):
        for scheme in OPTIONS["schemes"]:
            other = changed(model, name, scheme)
            if name == "embed":
                exact, off = x, other.embed(torch.cat([ids.flatten(), ids[0, :3]])) - x
            else:
                exact = model.experts(x, index)
                off = other.experts(x, index) - exact
            option = found.options[name][scheme]
            assert option.error == pytest.approx(float(off.norm() / exact.norm()), rel=1e-3)
            layer = ao.find_layers(model).replaceable[name]
            assert option.bytes == ao.stored_bytes(layer.quantize(ao.parse_scheme(scheme)))
    assert found.totals(dict.fromkeys(found.options, "float")).bytes == ao.model_bytes(model).total


def test_the_time_of_a_module_is_divided_among_its_stacks(mixture, monkeypatch):
    from ao_autoquant import subject
    from ao_autoquant.measure import Time

    def seconds(layer, weight, call):  # of the whole module; 30 less for a quantized stack
        return Time(70.0 if isinstance(weight, ao.QuantizedTensor) else 100.0, 1.0)

    monkeypatch.setattr(subject, "module_time", seconds)
    model, ids = mixture
    found = explore(model, ids, **OPTIONS)
    up, down = found.options["experts.up"], found.options["experts.down"]
    assert up["float"].us + down["float"].us == pytest.approx(100)
    assert up["float"].us - up["uint4"].us == pytest.approx(30)
    assert found.options["embed"]["float"].us == pytest.approx(100)

    earlier = explore(model, ids, schemes=["int8-weight-only"], isolate=False)
    later = explore(model, ids, known=earlier, **OPTIONS).options["experts.up"]
    assert later["float"].us - later["uint4"].us == pytest.approx(30)


def test_nats_of_stacks_and_embeddings(mixture, monkeypatch):
    """Against the divergence in float64; rows of labels are few, so that the estimate is a rough one."""
    model, ids = mixture
    kl = explore(model, ids, error="kl", **OPTIONS)
    big = torch.randint(0, 40, (64, 32))
    monkeypatch.setattr(module, "ROWS", {"loss": 4096, "kl": 512})
    loss = explore(model, big, error="loss", **OPTIONS)
    for name in ("experts.up", "experts.down", "embed"):
        other = changed(model, name, "uint4")
        with torch.no_grad():
            p, q = (each(ids).double().log_softmax(-1) for each in (model, other))
        truth = float((p.exp() * (p - q)).sum(-1).mean())
        assert kl.options[name]["uint4"].error == pytest.approx(truth, rel=0.02)
        assert loss.options[name]["uint4"].error == pytest.approx(truth, rel=0.5)


def test_a_plan_converts_them(mixture):
    model, ids = mixture
    before = dict(model.named_parameters())
    found = explore(model, ids, **OPTIONS)
    assert all(each is before[name] for name, each in model.named_parameters())
    least = found.totals(found.choose("bytes")).bytes
    autoquant(model, ids, objective="error", max_bytes=least, apply=True, **OPTIONS)
    assert ao.model_bytes(model).total == least
    assert isinstance(model.experts.up, ao.QuantizedTensor) and isinstance(
        model.embed.weight, ao.QuantizedTensor
    )
    assert found.plan("error", Budget(max_bytes=least)).layers["experts.up"].scheme == "uint4"


def test_activations_are_not_quantized_in_an_embedding(mixture):
    model, ids = mixture
    found = explore(model, ids, schemes=["int8-dynamic"], isolate=False)
    assert "quantizes activations" in found.rejected["embed"]["int8-dynamic"]


def test_of_many_sizes_a_few_are_kept(mixture):
    model, _ = mixture
    found = profile(model, [torch.randint(0, 40, (1, n)) for n in (1, 2, 3, 4, 9, 10)])
    assert found.seen["embed"].calls == {1: 1.0, 2: 1.0, 3: 1.0, 4: 3.0}


def test_a_stranger_is_tried_on_one_matrix_in_a_child(mixture):
    model, ids = mixture
    found = explore(model, ids, schemes=["uint4"], wanted=lambda _, name: name == "experts.up")
    assert not found.faults and found.options["experts.up"]["uint4"].bytes > 0


def test_convolutions_and_tied_embeddings_are_left_with_a_reason():
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Flatten(), nn.Linear(12, 3))
    assert "convolution" in profile(model, torch.randn(1, 2, 3)).left["0"]
