"""torchao's names: the paper's arithmetic by default, torchao's own on request, none of its defects."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import gaussian
from torch import nn

import ao_core as ao
from ao_sparsity.torchao_compat import PerChannelNormObserver, WandaSparsifier


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(50, 32), nn.Linear(32, 17), nn.Linear(17, 8)

    def forward(self, ids):
        return self.last(self.first(self.embedding(ids)).relu())


def prepared(**options):
    torch.manual_seed(0)
    model = Model()
    original = copy.deepcopy(model)
    sparsifier = WandaSparsifier(**options)
    sparsifier.prepare(model, config=None)
    ids = torch.arange(50).view(5, 10)
    model(ids)
    return model, original, sparsifier, ids


@pytest.mark.parametrize("old", [False, True])
def test_masks_are_those_of_the_definition(old):
    model, original, sparsifier, ids = prepared(sparsity_level=0.5, torchao_2024=old)
    sparsifier.step()
    sparsifier.squash_mask()
    x = original.embedding(ids).detach().flatten(0, 1).double()
    for name in ("first", "last"):
        weight = original.get_submodule(name).weight.detach().double()
        norm = x.square().sum(0) if old else x.square().sum(0).sqrt()
        metric = weight.abs() * norm
        if old:  # over the whole layer
            least = metric.flatten().argsort()[: metric.numel() // 2]
            expected = weight.flatten().scatter(0, least, 0).view_as(weight)
        else:
            least = metric.argsort(dim=1)[:, : weight.shape[1] // 2]
            expected = weight.scatter(1, least, 0)
        torch.testing.assert_close(model.get_submodule(name).weight.double(), expected, rtol=0, atol=1e-7)
        x = (x @ weight.t() + original.get_submodule(name).bias.double()).relu().detach()


def test_2_4_and_a_step_again():
    """2:4 of known scores; a second step, on more data, finds the mask anew and prunes no more."""
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2, 3, 4, 4, 3, 2, 1]])
    sparsifier = WandaSparsifier(semi_structured_block_size=4)
    sparsifier.prepare(model, None)
    model(torch.ones(1, 8))
    sparsifier.step()
    assert model[0].weight.tolist() == [[0, 0, 3, 4, 4, 3, 0, 0]]
    model(torch.tensor([[100.0, 1, 1, 1, 1, 1, 1, 100]]))
    sparsifier.step()
    assert model[0].weight.tolist() == [[1, 0, 0, 4, 4, 0, 0, 1]]
    assert hasattr(model[0].parametrizations["weight"][0], "mask")
    sparsifier.squash_mask()
    assert not hasattr(model[0], "parametrizations") and not hasattr(model[0], "activation_post_process")
    assert not model[0]._forward_pre_hooks
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.tolist() == [[1, 0, 0, 4, 4, 0, 0, 1]]


def test_embeddings_are_left_alone():
    model, original, sparsifier, ids = prepared(sparsity_level=0.5)
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(model.embedding.weight, original.embedding.weight)
    named = Model()
    weight = named.embedding.weight.detach().clone()
    explicit = WandaSparsifier(0.5)
    explicit.prepare(named, [{"tensor_fqn": "embedding.weight"}, {"tensor_fqn": "first.weight"}])
    named(ids)
    explicit.step()
    explicit.squash_mask()
    assert torch.equal(named.embedding.weight, weight)
    assert int((named.first.weight == 0).sum()) == 17 * 16


def test_layers_have_their_own_levels_and_bad_input_is_refused(caplog):
    model = Model()
    sparsifier = WandaSparsifier(0.5)
    config = [{"tensor_fqn": "first.weight", "sparsity_level": 0.25}, {"tensor_fqn": "last.weight"}]
    sparsifier.prepare(model, config)
    with pytest.raises(ao.ModelError, match="no input has reached any"):
        sparsifier.step()
    model.first(gaussian(3, 32))  # the last layer is never reached
    sparsifier.step()
    assert int((model.first.weight == 0).sum()) == 17 * 8
    assert "no input reached last.weight" in caplog.text
    assert int((model.last.weight == 0).sum()) == 8 * 8
    for bad in ({"sparsity_level": 1.0}, {"sparsity_level": -0.1}):
        with pytest.raises(ao.OptionError, match="from 0 to below 1"):
            WandaSparsifier(**bad)


def test_the_observer():
    observer, old = PerChannelNormObserver(), PerChannelNormObserver(squared=True)
    batches = [gaussian(3, 5, 63), gaussian(1, 63), gaussian(63)]
    for x in batches:
        assert observer(x) is x and old(x) is x
    rows = torch.cat([x.reshape(-1, 63) for x in batches]).double()
    torch.testing.assert_close(observer.norm.double(), rows.norm(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(old.norm.double(), rows.square().sum(0), rtol=1e-5, atol=1e-6)
    empty = PerChannelNormObserver()
    empty(torch.arange(5))
    assert empty.integers and empty.norm.numel() == 0
