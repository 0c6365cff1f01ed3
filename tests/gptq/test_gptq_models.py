"""GPTQ on models: composed, experts, shared inputs, asymmetric calibration."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import Block, data, gaussian, hessian_of, inputs, model_of
from torch import nn

import ao_core as ao
from ao_core.calibrate import Hessian, PairedHessian
from ao_gptq.factor import Factor
from ao_gptq.layers import _aim, _shared
from ao_gptq.ranges import choose, scales


@pytest.mark.parametrize(
    "options",
    [
        "",
        ",act_order=False",
        ",mse=False,static_groups=True,act_order=False,block_size=7",
        ",true_sequential=True",
        ",asymmetric=1.0",
        ",true_sequential=True,asymmetric=0.5",
    ],
)
def test_a_model(options):
    model, batches, unseen = model_of(), data(), inputs(64, 300, 9)
    expected, rounded = model(unseen).detach(), copy.deepcopy(model)
    ao.quantize_(rounded, "int4-weight-only:group_size=32")
    report = ao.compress_(model, f"gptq:scheme=(int4-weight-only:group_size=32){options}", batches)
    assert len(report.converted) == 9
    for facts in report.notes.values():
        assert facts["gptq"] == "done" and facts["error"] < facts["error_rounded"]
        assert facts["tokens"] == 1200 and facts["percdamp"] == 0.01
    assert type(model[0].up.weight) is type(rounded[0].up.weight)
    assert ao.sqnr(expected, model(unseen)) > ao.sqnr(expected, rounded(unseen)) + 0.5


def test_it_composes_with_smoothquant():
    """Channels 50 times larger than the others: each helps by itself, and both together most."""
    model, batches, unseen = model_of(), data(), inputs(64, 300, 9)
    for block in model:
        block.norm.weight.data[[3, 40]] *= 50
    expected = model(unseen).detach()

    def lost(algorithms):
        tried = copy.deepcopy(model)
        report = ao.compress_(tried, algorithms, batches, scheme="int8-dynamic")
        assert len(report.converted) == 9
        return ao.sqnr(expected, tried(unseen)), report

    smoothed, _ = lost(["smoothquant"])
    rounded, _ = lost(["gptq"])
    both, report = lost(["smoothquant", "gptq"])
    assert both > smoothed + 1 and both > rounded + 1
    for facts in report.notes.values():
        assert facts["gptq"] == "done" and facts["error"] < facts["error_rounded"]
        assert "alpha" in facts or "smoothquant" in facts


def test_a_layer_without_tokens_is_rounded():
    class Spare(Block):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(17, 5)

    torch.manual_seed(0)
    model = nn.Sequential(Spare(), Spare()).eval()
    weight = model[0].spare.weight.detach().clone()
    report = ao.compress_(model, "gptq:scheme=int8-weight-only", data())
    assert "saw no token" in report.notes["0.spare"]["gptq"]
    expected = ao.parse_scheme("int8-weight-only").quantize(weight)
    assert torch.equal(model[0].spare.weight.dequantize(), expected.dequantize())


def test_layers_where_rounding_is_no_worse_keep_it():
    """One column has no other to make up for its error."""
    model = nn.Sequential(nn.Linear(1, 17)).eval()
    expected = ao.parse_scheme("int8-weight-only").quantize(model[0].weight.detach())
    report = ao.compress_(model, "gptq:scheme=int8-weight-only,mse=False", [torch.randn(30, 1)])
    assert "no better than rounding" in report.notes["0"]["gptq"]
    assert torch.equal(model[0].weight.dequantize(), expected.dequantize())


def test_a_pinned_provider_is_kept():
    plan = ao.resolve(model_of(), [ao.Rule("*", "int8-weight-only", provider="reference")])
    model = model_of()
    ao.compress_(model, "gptq", data(), scheme=plan)
    assert model[1].up.weight.provider == "reference"


def test_experts():
    """Each matrix of a stack has its own Hessian; one that saw no token has that of all."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 40, 64) / 8)

        def forward(self, x):
            rows = x.reshape(-1, 64)
            half = len(rows) // 2
            out = [F.linear(rows[:half], self.weight[0]), F.linear(rows[half:], self.weight[2])]
            return torch.cat(out)

    torch.manual_seed(0)
    model = Experts().eval()
    weight = model.weight.detach().clone()
    report = ao.compress_(model, "gptq:scheme=int8-weight-only", data())
    (facts,) = report.notes.values()
    said = [each["gptq"] for each in facts["experts"]]
    assert said[0] == said[2] == "done" and "on the tokens of all experts" in said[1]
    assert isinstance(model.weight, ao.QuantizedTensor)
    assert ao.sqnr(weight, model.weight.dequantize()) > 35


def test_experts_with_too_few_tokens_share_a_hessian():
    """Of three experts one saw 7 tokens: alone they would fit it to these, all tokens do better."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(gaussian(3, 40, 64))

        def forward(self, x):
            cuts = zip(x.split([7, 200, len(x) - 207]), self.weight, strict=True)
            return torch.cat([F.linear(rows, weight) for rows, weight in cuts])

    x, unseen = inputs(64, 600), inputs(64, 500, 9)
    weight = gaussian(3, 40, 64)

    def error(options):
        model = Experts().eval()
        report = ao.compress_(model, f"gptq:scheme=(int4-weight-only:group_size=32){options}", [x])
        wrong = (model.weight.dequantize()[0] - weight[0]) @ unseen.t()
        (facts,) = report.notes.values()
        return float(wrong.norm()), facts["experts"]

    shared, facts = error("")
    assert "on the tokens of all experts" in facts[0]["gptq"] and facts[0]["tokens"] == 7
    assert facts[1]["gptq"] == facts[2]["gptq"] == "done"
    alone, facts = error(",min_tokens=1")
    assert facts[0]["gptq"] == "done"
    assert shared < 0.9 * alone


def test_the_shared_hessian_is_that_of_all_tokens():
    parts, x = [Hessian(63) for _ in range(3)], inputs(63, 300) * torch.linspace(0.1, 9, 300).unsqueeze(1)
    for part, rows in zip(parts, x.split([7, 200, 93]), strict=True):
        part.update(rows)
    found = _shared(parts)
    assert found.tokens == 300
    torch.testing.assert_close(found.value, hessian_of(x), rtol=1e-4, atol=1e-3)
    assert _shared([Hessian(63), Hessian(63)]) is None


def test_the_search_for_parameters_weighs_columns_by_their_inputs():
    """The weighted error is no larger than the scheme's own, smaller in many groups; one scale stays one."""
    made, weight = ao.parse_scheme("int4-weight-only:group_size=32,zero_point=integer"), gaussian(17, 100)
    importance = torch.linspace(0.1, 30, 100).unsqueeze(0)

    def errors(qparams):
        wrong = (made.decode(made.encode(weight, qparams), qparams) - weight).double().square() * importance
        return F.pad(wrong, (0, 28)).view(17, 4, 32).sum(-1)

    own = errors(made.choose_qparams(weight))
    chosen = choose(weight, importance, made, [10, 7], 32)
    for name, value in made.choose_qparams(weight).items():
        assert torch.equal(chosen.own[name], value)
    found = errors(chosen.qparams)
    assert bool((found <= own * (1 + 1e-6)).all()) and (found < own).double().mean() > 0.4
    one = ao.parse_scheme("float8-weight-only:granularity=tensor")
    scale = choose(weight, importance, one, [10, 7], 100).qparams["scale"]
    assert len(scale[:10].unique()) == len(scale[10:].unique()) == 1
    with_steps = ao.parse_scheme("ternary")
    assert scales(with_steps) and scales(made) and scales(ao.parse_scheme("nf4"))


def test_layers_with_the_same_input_are_solved_together(monkeypatch):
    """One factorization for gate and up, and the codes that each would get alone."""
    model, alone, factorized = model_of(), model_of(), []
    of = Factor.of
    monkeypatch.setattr(Factor, "of", staticmethod(lambda h, **o: factorized.append(h) or of(h, **o)))
    scheme = "int4-weight-only:group_size=32"
    ao.compress_(model, "gptq", data(), scheme=scheme)
    assert len(factorized) == 6  # of three blocks: gate and up, down
    ao.compress_(alone, "gptq", data(), scheme=scheme, include="0.up")
    assert torch.equal(model[0].up.weight.dequantize(), alone[0].up.weight.dequantize())


def test_asymmetric_calibration_aims_at_the_float_models_outputs():
    """The weight aimed at is the least squares of the float outputs on the inputs seen."""
    x, wanted, weight = inputs(63, 400), inputs(63, 400) + inputs(63, 400, 1) / 4, gaussian(17, 63)
    found = PairedHessian(63)
    found.pair(x, wanted)
    factor = Factor.of(found.value, percdamp=0.0)
    aim = _aim(weight, found, factor, 1.0)
    expected = torch.linalg.lstsq(x.double(), wanted.double() @ weight.double().t()).solution.t()
    torch.testing.assert_close(aim.double(), expected, rtol=2e-2, atol=2e-2)
    half = _aim(weight, found, factor, 0.5)
    torch.testing.assert_close(half, (weight + aim) / 2)
    ordered = _aim(weight, found, Factor.of(found.value, percdamp=0.0, act_order=True), 1.0)
    torch.testing.assert_close(ordered, aim, rtol=1e-2, atol=1e-2)


def test_quantized_activations_are_what_calibration_sees():
    model, batches = nn.Sequential(nn.Linear(64, 17)).eval(), [inputs(64, 300) * 3]
    seen = []
    scheme = ao.parse_scheme("int8-dynamic-int4-weight")

    class Watched(type(scheme)):
        def quantize_input(self, x):
            seen.append(super().quantize_input(x))
            return seen[-1]

    weight = scheme.quantize(torch.eye(64))
    ao.compress_(model, "gptq", batches, scheme=Watched())
    steps, x = seen[0] - batches[0], batches[0]
    assert 0 < steps.abs().max() <= (x.amax(-1) - x.amin(-1)).max() / 255
    # The linear itself multiplies by these: a weight of ones on the diagonal, in its own 4 bits.
    through = F.linear(batches[0], weight)
    torch.testing.assert_close(through, seen[0] @ weight.dequantize().t(), rtol=1e-4, atol=1e-4)
    for name in ("int8-dynamic", "float8-dynamic"):
        made = ao.parse_scheme(name)
        weight = made.quantize(gaussian(17, 64))
        expected = made.quantize_input(x).float() @ weight.dequantize().t()
        torch.testing.assert_close(F.linear(x, weight), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(ao.parse_scheme("nf4").quantize_input(x), x)
