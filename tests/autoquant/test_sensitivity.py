"""Errors in nats: estimated from gradients and measured, against Kullback-Leibler divergences in float64."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ao_core as ao
from ao_autoquant import explore, sensitivity
from ao_autoquant import gradients as of_outputs
from ao_autoquant.gradients import gradients, segments, squares_of
from ao_autoquant.logits import counted, divergence, logits_of, next_token_nll
from ao_autoquant.profile import profile
from ao_autoquant.search import Budget
from ao_autoquant.sensitivity import FromGradients, exchanged

SCHEMES = ["int8-dynamic", "uint4"]


@pytest.fixture
def classifier():
    """Rows that don't meet, so that the estimate has nothing to neglect but chance and the third order."""
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)]
    return nn.Sequential(*layers).eval(), torch.randn(4000, 32)


@torch.no_grad()
def exact(model, x, name, scheme):
    """KL of the float model and of one with a single changed layer, for each row; in float64."""
    changed = copy.deepcopy(model)
    if scheme == "int8-dynamic":  # quantizes activations: in float32, as it will run
        ao.quantize_(changed, scheme, include=name)
    else:
        layer = changed.get_submodule(name)
        layer.weight.data = ao.parse_scheme(scheme).quantize(layer.weight).dequantize()
        changed, x, model = changed.double(), x.double(), copy.deepcopy(model).double()
    p, q = (each(x).double().log_softmax(-1) for each in (model, changed))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("measure", ["loss", "kl"])
def test_nats_are_those_of_the_changed_model(classifier, measure, monkeypatch):
    monkeypatch.setattr(sensitivity, "ROWS", {"loss": 4000, "kl": 4000})
    model, x = classifier
    found = explore(model, x, schemes=SCHEMES, error=measure, isolate=False)
    for name, options in found.options.items():
        for scheme in SCHEMES:
            expected = exact(model, x, name, scheme)
            assert options[scheme].error == pytest.approx(expected, rel=0.15 if measure == "loss" else 0.02)
        assert options["float"].error == 0
    chosen = dict.fromkeys(found.options, "uint4")
    assert found.totals(chosen).error == pytest.approx(sum(o["uint4"].error for o in found.options.values()))


def test_gradients_against_autograd(classifier):
    model, x = classifier
    seen = profile(model, x[:7]).seen
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = gradients(model, {name: each.layer for name, each in seen.items()}, [x[:5], x[5:7]])
    assert all(bool((p.grad == 1).all()) and p.requires_grad for p in model.parameters())
    draw = torch.Generator().manual_seed(0)
    for number, rows in enumerate((x[:5], x[5:7])):
        for turn in range(of_outputs.DRAWS):
            labels = torch.multinomial(model(rows).softmax(-1), 1, generator=draw)[:, 0]
            model.zero_grad()
            nn.functional.cross_entropy(model(rows), labels, reduction="sum").backward()
            for name, pairs in found.items():
                g = pairs[number].gradients[turn]
                torch.testing.assert_close(
                    g.T @ pairs[number].call.args[0], model.get_submodule(name).weight.grad
                )
                assert pairs[number].segment == 1
    assert not any(module._forward_hooks for module in model.modules())


class Twice(nn.Module):
    """One layer called twice, another whose output goes nowhere."""

    def __init__(self):
        super().__init__()
        self.body, self.idle, self.head = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, x):
        self.idle(x)
        return SimpleNamespace(logits=self.head(self.body(self.body(x).relu())))


def test_layers_that_are_called_twice_or_for_nothing():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 8)
    seen = profile(model, x).seen
    found = gradients(model, {name: each.layer for name, each in seen.items()}, [x])
    assert len(found["body"]) == 2 and found["idle"] == []
    torch.testing.assert_close(found["body"][0].call.args[0], x)
    assert FromGradients(model, seen, [x]).increase("idle", torch.zeros(3, 8)) == 0
    labels = torch.multinomial(model(x).logits.softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(x).logits, labels[:, 0], reduction="sum").backward()
    total = sum(pair.gradients[0].T @ pair.call.args[0] for pair in found["body"])
    torch.testing.assert_close(total, model.body.weight.grad)


class Averaging(nn.Module):
    """Every token sees the mean of the values of all: errors that tokens have in common add up."""

    def __init__(self):
        super().__init__()
        self.value, self.head = nn.Linear(16, 32), nn.Linear(32, 12)

    def forward(self, x):
        return self.head(torch.tanh(self.value(x).mean(1, keepdim=True) + 0.1 * x.repeat(1, 1, 2)))


def test_rows_of_a_sequence_are_not_taken_as_independent(monkeypatch):
    torch.manual_seed(0)
    model, x = Averaging().eval(), torch.randn(128, 16, 16) + 1.0
    seen = profile(model, x).seen
    monkeypatch.setattr(sensitivity, "ROWS", {"loss": 2048, "kl": 2048})
    weight = seen["value"].layer.quantize(ao.parse_scheme("uint4"))
    truth = sensitivity.Divergence(model, seen, [x]).increase("value", weight)
    assert FromGradients(model, seen, [x]).increase("value", weight) == pytest.approx(truth, rel=0.4)
    monkeypatch.setattr(of_outputs, "SEGMENT", 1)
    monkeypatch.setattr(sensitivity, "FEW", 0)
    assert FromGradients(model, seen, [x]).increase("value", weight) < truth / 3


def test_with_few_stretches_the_mean_over_rounding_errors_counts(monkeypatch):
    """What errors of the same sizes cost on average, whichever way each of them was rounded."""
    torch.manual_seed(0)
    model, x = Averaging().eval(), torch.randn(6, 200, 16) + 1.0
    seen = profile(model, x).seen
    layer, quantized = seen["value"].layer, seen["value"].layer.quantize(ao.parse_scheme("uint4"))
    few = FromGradients(model, seen, [x]).increase("value", quantized)
    change = (quantized.dequantize() - layer.weight).detach()
    signs = torch.randint(0, 2, (400, *change.shape), generator=torch.Generator().manual_seed(1)) * 2 - 1
    by_sums = FromGradients(model, seen, [x])
    each = torch.tensor([by_sums.increase("value", layer.weight.detach() + s * change) for s in signs])
    assert few == pytest.approx(float(each.mean()), rel=4 * float(each.std()) / float(each.mean()) / 20)
    assert float(each.std()) > few / 4  # what a single one is worth
    monkeypatch.setattr(sensitivity, "FEW", 0)
    alone = FromGradients(model, seen, [x]).increase("value", quantized)
    assert alone != pytest.approx(few, rel=0.01)
    dynamic = layer.quantize(ao.parse_scheme("int8-dynamic"))
    monkeypatch.setattr(sensitivity, "FEW", 256)
    weights = FromGradients(model, seen, [x]).increase(
        "value", layer.quantize(ao.parse_scheme("int8-weight-only"))
    )
    assert FromGradients(model, seen, [x]).increase("value", dynamic) > 1.01 * weights  # activations, on top


def test_squares_against_float64():
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 7, size, generator=generator) for size in (5, 4))
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for example in range(3):
        for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):
            expected += (g[example, rows].double().t() @ x[example, rows].double()) ** 2
    torch.testing.assert_close(squares_of(x, g, 3).double(), expected, rtol=1e-5, atol=1e-6)
    ones = squares_of(x[0], g[0], 1).double()
    torch.testing.assert_close(ones, (g[0].double() ** 2).t() @ x[0].double() ** 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares_of(x[0, 0], g[0, 0], 1), (g[0, 0].outer(x[0, 0])) ** 2)


def test_segments_are_sums_of_neighbours():
    rows = torch.arange(10.0).view(2, 5)
    assert segments(rows, 2).tolist() == [[1, 5, 4], [11, 15, 9]]
    assert torch.equal(segments(rows, 1), rows)
    assert segments(rows, 128).tolist() == [[10], [35]]


def test_layers_in_groups_are_as_all_at_once(classifier, monkeypatch):
    model, x = classifier
    seen = profile(model, x).seen
    weights = {name: each.layer.quantize(ao.parse_scheme("uint4")) for name, each in seen.items()}
    at_once = FromGradients(model, seen, [x])
    expected = {name: at_once.increase(name, weight) for name, weight in weights.items()}
    monkeypatch.setattr(sensitivity, "_HELD_BYTES", 1)
    one_by_one = FromGradients(model, seen, [x])
    assert {name: one_by_one.increase(name, weight) for name, weight in weights.items()} == expected
    assert list(one_by_one._held) == ["4"]


def test_a_bounded_number_of_rows_is_looked_at(classifier):
    model, x = classifier
    taken = sensitivity.bounded(model, list(x.split(100)), 250)
    assert [rows for _, rows in taken] == [100, 100]
    assert len(sensitivity.bounded(model, [x], 250)) == 1


def test_nats_are_kept_and_depend_on_the_whole_model(classifier):
    model, x = classifier
    options = {"schemes": ["uint4"], "error": "loss", "isolate": False}
    first = explore(model, x[:64], **options)
    second = explore(model, x[:64], **options)
    assert second.measured == 0 and second.options == first.options
    with torch.no_grad():
        model[4].bias[0] += 1.0  # a bias elsewhere, which no layer's own weight or sample shows
    third = explore(model, x[:64], **options)
    assert third.measured == 3
    assert third.options["0"]["uint4"].error != first.options["0"]["uint4"].error
    assert third.options["0"]["uint4"].us == first.options["0"]["uint4"].us


def test_a_budget_in_nats_is_a_sum(classifier):
    model, x = classifier
    found = explore(model, x, schemes=SCHEMES, error="loss", isolate=False)
    least = found.totals(dict.fromkeys(found.options, "uint4")).error
    assert set(found.choose("bytes", Budget(max_error=least * 1.001)).values()) == {"uint4"}
    tight = found.choose("bytes", Budget(max_error=least * 0.9))
    assert "uint4" in tight.values() and set(tight.values()) != {"uint4"}
    assert found.totals(tight).error <= least * 0.9
    assert found.plan("bytes").layers["0"].evidence["error_measure"] == "loss"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (SimpleNamespace(last_hidden_state=torch.randn(2, 3)), "last_hidden_state.*no logits"),
        ({"states": torch.randn(2, 3)}, "states.*no logits"),
        (torch.randn(2, 3).softmax(-1), "probabilities"),
        (torch.ones(2, 3, dtype=torch.int64), "int64"),
        (torch.randn(4, 1), "no logits"),
        (torch.full((2, 3), float("nan")), "NaN"),
        ("text", "str"),
    ],
)
def test_what_is_no_logits_is_said(output, words):
    with pytest.raises(ao.ModelError, match=words):
        logits_of(output)


def test_logits_and_rows_that_count():
    logits = torch.randn(2, 3, 5)
    for output in (logits, SimpleNamespace(logits=logits), {"logits": logits}, (logits, torch.zeros(1))):
        assert logits_of(output) is logits
    ids = torch.tensor([[1, 2, 0], [3, 4, 1]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    assert counted(batch, logits).tolist() == [0, 1, 3, 4, 5]
    p = logits.double().log_softmax(-1)
    expected = [-p[0, 0, 2], -p[1, 0, 4], -p[1, 1, 1]]
    torch.testing.assert_close(next_token_nll(batch, logits).double(), torch.stack(expected))
    assert next_token_nll(torch.randn(2, 3), logits) is None
    assert len(next_token_nll(ids, logits)) == 4


def test_a_model_without_logits_is_refused_before_anything_is_chosen(classifier):
    model = nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1))
    with pytest.raises(ao.ModelError, match="probabilities"):
        explore(model, torch.randn(2, 8), error="loss", schemes=["uint4"], isolate=False)
    with pytest.raises(ao.OptionError, match="'nats' was given"):
        explore(model, torch.randn(2, 8), error="nats")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_exchanged_weight_comes_back(classifier, stop):
    model, _ = classifier
    layer = ao.find_layers(model).replaceable["2"]
    before, order = model[2].weight, list(model[2]._parameters)

    def interrupted():
        with exchanged([(layer, torch.zeros(48, 64))]):
            assert bool((model[2].weight == 0).all())
            raise stop

    with pytest.raises(stop):
        interrupted()
    assert model[2].weight is before and list(model[2]._parameters) == order


@pytest.mark.parametrize("off", [1e-4, 1e-2, 1.0, 30.0, 200.0])
def test_small_and_large_divergences_are_those_of_float64(off):
    torch.manual_seed(0)
    logits = 3 * torch.randn(700, 1000)
    changed = logits + off * torch.randn_like(logits)
    p, q = (each.double().log_softmax(-1) for each in (logits, changed))
    expected = float((p.exp() * (p - q)).sum())
    assert divergence(logits, changed) == pytest.approx(expected, rel=2e-3)
    assert divergence(logits, logits) == 0.0
    assert divergence(logits, changed * float("nan")) == float("inf")
