"""Plans on the whole model: measured, repaired, refined; the model stays as it was."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import ao_core as ao
from ao_autoquant import Budget, InfeasibleError, autoquant, check, explore
from ao_autoquant.check import checked, growth, measured_loss, quantized
from ao_autoquant.pipeline import carry_out
from ao_autoquant.refine import refine_
from ao_autoquant.report import findings
from ao_autoquant.search import Totals

SCHEMES = ["int8-weight-only", "uint4"]
OPTIONS = {"schemes": SCHEMES, "error": "loss", "isolate": False}


class Language(nn.Module):
    """Predicts the next token from this one and the mean of those before."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(40, 32), nn.Linear(32, 64), nn.Linear(64, 40)

    def forward(self, ids):
        x = self.embed(ids)
        mixed = x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return 3 * self.head(self.body(mixed).relu())


@pytest.fixture
def language():
    """A model, and what it says itself: there a changed model can only be worse, but for chance."""
    torch.manual_seed(0)
    model, ids = Language().eval(), torch.randint(0, 40, (64, 1))
    for _ in range(15):
        ids = torch.cat([ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1)], 1)
    return model, list(ids.split(16))


@torch.no_grad()
def reference(model, chosen, held):
    """ΔNLL of a token and KL of a row, of a model whose weights are what the schemes decode to."""
    changed = copy.deepcopy(model)
    for name, text in chosen.items():
        if text != "float":
            layer = changed.get_submodule(name)
            layer.weight.data = ao.parse_scheme(text).quantize(layer.weight).dequantize()
    nll, kl = [], []
    for ids in held:
        p, q = (each(ids).double().log_softmax(-1) for each in (model, changed))
        kl.append((p.exp() * (p - q)).sum(-1).flatten())
        nll.append((p - q)[:, :-1].gather(-1, ids[:, 1:, None]).flatten())
    return torch.cat(nll), torch.cat(kl)


def test_what_is_measured_is_what_the_converted_model_loses(language):
    model, held = language
    before = copy.deepcopy(model.state_dict())
    held_weights = {
        name: module.weight for name, module in model.named_modules() if hasattr(module, "weight")
    }
    plan = autoquant(model, held[0], objective="bytes", check=True, held=held[1:], **OPTIONS)
    chosen = {name: c.scheme or "float" for name, c in plan.layers.items() if "us" in c.evidence}
    found, (nll, kl) = plan.evidence["check"], reference(model, chosen, held[1:])
    assert found["loss"]["kl"] == pytest.approx(float(kl.mean()), rel=0.01)
    assert found["loss"]["nll"] == pytest.approx(float(nll.mean()), rel=0.02, abs=1e-6)
    means = nll.view(3, -1).mean(1)
    assert found["loss"]["nll_se"] == pytest.approx(float(means.std() / math.sqrt(3)), rel=0.02)
    assert found["loss"]["rows"] == 3 * 16 * 16 and found["float_s"] > 0 and found["plan_s"] > 0
    predicted = sum(c.evidence["error"] for c in plan.layers.values() if "error" in c.evidence)
    assert found["predicted"] == pytest.approx(predicted)
    assert ao.Plan.from_json(plan.to_json()).evidence["check"]["loss"] == found["loss"]
    assert all(model.get_submodule(name).weight is each for name, each in held_weights.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_that_costs_more_than_its_parts_is_repaired(language, monkeypatch):
    model, held = language
    found = explore(model, held[0], **OPTIONS)
    cheapest = found.choose("bytes")
    real = measured_loss(model, quantized(model, cheapest), held).nats
    lied = {
        layer: {
            name: option if name == "float" else type(option)(**{**vars(option), "error": option.error / 9})
            for name, option in options.items()
        }
        for layer, options in found.options.items()
    }
    wrong = type(found)(**{**vars(found), "options": lied})
    budget = Budget(max_error=real / 4)
    assert wrong.choose("bytes", budget) == cheapest  # the parts, a ninth of the truth, let it pass
    arguments = {
        "objective": "bytes", "budget": budget, "together": (), "held": held,
        "examples": held[:1], "counts": [1],
    }  # fmt: skip
    chosen, result = checked(model, wrong, **arguments)
    assert len(result.tried) > 1 and result.tried[0][1] == pytest.approx(real)
    assert chosen != cheapest and set(chosen.values()) != {"float"}
    assert measured_loss(model, quantized(model, chosen), held).nats <= budget.max_error
    monkeypatch.setattr(check, "ROUNDS", 1)
    chosen, result = checked(model, wrong, **arguments)
    assert result.kept == "int8-weight-only" and set(chosen.values()) == {"int8-weight-only"}
    size = wrong.totals(cheapest).bytes
    arguments["budget"] = Budget(max_error=real / 4, max_bytes=size)
    with pytest.raises(InfeasibleError, match=rf"1 were tried.*least reached is {real:.4g}"):
        checked(model, wrong, **arguments)
    monkeypatch.setattr(check, "ROUNDS", 5)
    with pytest.raises(InfeasibleError, match=r"when measured on the whole model.*Then no plan keeps to"):
        checked(model, wrong, **arguments)


def lying(found, **factors):
    """Errors of single schemes, times a factor."""
    return replace(
        found,
        options={
            layer: {
                name: replace(each, error=each.error * factors.get(name.replace("-", "_"), 1))
                for name, each in options.items()
            }
            for layer, options in found.options.items()
        },
    )


def test_a_uniform_scheme_is_kept_where_no_plan_fits():
    loss = {"kl": 0.1, "nll": 0.2, "nll_se": 0.3}
    check = {"loss": loss, "predicted": 0.1, "plan_s": 1.0, "float_s": 1.0, "tried": [], "kept": "uint4"}
    evidence = {"error_measure": "loss", "check": {**check, "uniform": {"uint4": (0.3, 0.2)}}}
    assert findings(ao.Plan({}, {}, evidence))[1] == (
        "by the sum of its parts no plan fits; uint4 on all layers was kept: measured on the whole model it "
        "fits; uniform schemes cost uint4 0.2 nats"
    )


def test_a_checked_plan_is_no_worse_than_a_uniform_scheme_that_fits(language):
    """The parts say that uint4 costs nothing and int8 much: measured, it is the other way round."""
    model, held = language
    found = explore(model, held[0], **OPTIONS)
    wrong = lying(found, uint4=1e-6, int8_weight_only=1e6, float=1)
    uniform = found.uniform()
    size = found.totals(uniform["int8-weight-only"]).bytes
    budget = Budget(max_bytes=size)
    assert wrong.choose("error", budget) == uniform["uint4"]
    outcome = carry_out(model, wrong, held[0], objective="error", budget=budget, check=True, held=held[1:])
    real = {name: reference(model, each, held[1:])[0].mean().item() for name, each in uniform.items()}
    evidence = outcome.plan.evidence["check"]
    assert outcome.chosen == uniform["int8-weight-only"] and evidence["kept"] == "int8-weight-only"
    assert set(evidence["uniform"]) == {"int8-weight-only"}  # uint4 is the plan, and float is too large
    assert evidence["uniform"]["int8-weight-only"][1] == pytest.approx(real["int8-weight-only"], abs=2e-5)
    assert evidence["loss"]["nll"] == evidence["uniform"]["int8-weight-only"][1] < evidence["tried"][0][1]
    assert any("int8-weight-only on all layers was kept" in line for line in findings(outcome.plan))
    honest = carry_out(
        model, found, held[0], objective="error", budget=budget, check=True, held=held[1:]
    ).plan.evidence["check"]
    assert all(honest["loss"]["nll"] <= real for _, real in honest["uniform"].values())


def test_a_uniform_scheme_that_the_parts_forbid_may_be_faster(language):
    """max_error is kept when measured, and the parts say that int8 breaks it."""
    model, held = language
    found = explore(model, held[0], **OPTIONS)
    wrong = lying(found, uint4=1e6, int8_weight_only=1e6)
    budget = Budget(max_error=0.05)
    assert set(wrong.choose("bytes", budget).values()) == {"float"}
    arguments = {
        "objective": "bytes", "budget": budget, "held": held[1:], "examples": held[:1], "counts": [1],
    }  # fmt: skip
    chosen, result = checked(model, wrong, together=(), **arguments)
    costs = {
        name: reference(model, each, held[1:])[0].mean().item() for name, each in wrong.uniform().items()
    }
    fit = [name for name, cost in costs.items() if cost <= 0.05]
    best = min(fit, key=lambda name: wrong.totals(wrong.uniform()[name]).bytes)
    assert best != "float" and result.kept == best and chosen == wrong.uniform()[best]
    group = [["body", "head"], ["embed", "body"]]
    assert checked(model, wrong, together=group, **arguments)[1].kept == best
    lone = replace(wrong, options={
        layer: {name: each for name, each in options.items() if layer != "head" or name != best}
        for layer, options in wrong.options.items()
    }, rejected={"head": {best: "no"}})  # fmt: skip
    assert best not in checked(model, lone, together=group, **arguments)[1].uniform
    plan = lone.plan_for(lone.uniform()[best], uniform=best)
    assert plan.layers["head"].reason.endswith("does not fit here: no")


@pytest.mark.parametrize(
    ("limit", "fits"),
    [
        ({}, True), ({"max_error": 2}, True), ({"max_error": 1.9}, False), ({"max_bytes": 9}, False),
        ({"max_bytes": 10}, True), ({"max_latency": 4}, False), ({"max_latency": 5}, True),
        ({"min_speedup": 2}, True), ({"min_speedup": 2.1}, False),
    ],
)  # fmt: skip
def test_what_a_budget_allows(limit, fits):
    assert Budget(**limit).allows(Totals(us=5, bytes=10, error=2), float_us=10) is fits


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_check_that_is_interrupted_leaves_the_model(language, stop):
    model, held = language
    found = explore(model, held[0], **OPTIONS)
    weight, calls = model.body.weight, []

    def interrupt(module, args):
        calls.append(module.weight)
        if isinstance(module.weight, ao.QuantizedTensor):
            raise stop

    hook = model.body.register_forward_pre_hook(interrupt)
    model.train()
    with pytest.raises(stop):
        carry_out(model, found, held[0], objective="bytes", check=True)
    hook.remove()
    assert isinstance(calls[-1], ao.QuantizedTensor)
    assert model.body.weight is weight and model.training and model.body.training


def test_the_growth_of_a_loss_without_labels_is_none():
    assert growth([None], [None]) == (None, None)
    assert growth([torch.tensor([1.0, 2.0])], [torch.tensor([1.5, 2.0])]) == (0.25, None)


def test_relative_errors_are_checked_but_not_compared(language):
    model, held = language
    plan = autoquant(
        model, held[0], objective="bytes", max_error=0.5, check=True, schemes=SCHEMES, isolate=False
    )
    assert len(plan.evidence["check"]["tried"]) == 1
    assert plan.evidence["error_measure"] == "output"


def test_refining_by_gptq_is_compressing_along_the_plan(language):
    pytest.importorskip("ao_gptq")
    model, held = language
    plan = ao.Plan({"body": ao.Choice("uint4"), "head": ao.Choice("int8-weight-only")})
    expected = copy.deepcopy(model)
    ao.compress_(expected, "gptq", held, scheme=plan)
    report = refine_(model, plan, "gptq", held)
    for name in ("body", "head"):
        got, wanted = model.get_submodule(name).weight, expected.get_submodule(name).weight
        assert torch.equal(got.dequantize(), wanted.dequantize())
        assert report.plan.layers[name].evidence["gptq"]
    assert set(report.converted) == {"body", "head"}


def test_layers_that_gptq_cannot_take_are_rounded_and_named(language):
    pytest.importorskip("ao_gptq")
    model, held = language
    plain = copy.deepcopy(model)
    plan = ao.Plan(
        {"body": ao.Choice("uint4"), "embed": ao.Choice("uint4"), "head": ao.Choice(None, reason="no")}
    )
    before = ao.model_bytes(model).total
    report = refine_(model, plan, "gptq", held)
    assert report.plan.layers["embed"].evidence["refine"].startswith("rounded: it is no matrix")
    wanted = ao.parse_scheme("uint4").quantize(plain.embed.weight).dequantize()
    assert torch.equal(model.embed.weight.dequantize(), wanted)
    assert report.plan.layers["head"].reason == "no"
    assert report.bytes_before == before and report.bytes_after == ao.model_bytes(model).total


def test_a_refinement_that_fails_takes_rounded_layers_back(language):
    pytest.importorskip("ao_gptq")
    model, held = language
    embed, body = model.embed.weight, model.body.weight
    plan = ao.Plan({"body": ao.Choice("uint4"), "embed": ao.Choice("uint4")})
    with pytest.raises(IndexError):
        refine_(model, plan, "gptq", [torch.full((1, 4), 99)])
    assert model.embed.weight is embed and model.body.weight is body
    with pytest.raises(ao.OptionError, match="can refine none of the plan's layers"):
        refine_(model, ao.Plan({"embed": ao.Choice("uint4")}), "gptq", held)
    assert model.embed.weight is embed


def test_autoquant_refines_and_measures_again(language):
    pytest.importorskip("ao_gptq")
    model, held = language
    plan = autoquant(
        model,
        held[0],
        objective="bytes",
        check=True,
        held=held[1:],
        refine="gptq",
        calibration=held,
        **OPTIONS,
    )
    assert isinstance(model.body.weight, ao.QuantizedTensor)
    assert plan.evidence["refined"]["nll"] is not None
    assert plan.layers["body"].evidence["gptq"] and plan.layers["body"].evidence["us"] > 0


def test_an_algorithm_that_is_not_installed_is_named_before_measuring(language, monkeypatch, cache_file):
    from ao_core.algorithm import ALGORITHMS

    model, held = language
    ao.algorithms()
    monkeypatch.delitem(ALGORITHMS._entries, "gptq", raising=False)
    with pytest.raises(ao.UnknownNameError, match="pip install ao-gptq"):
        autoquant(model, held[0], refine="gptq", **OPTIONS)
    assert not cache_file.exists()
