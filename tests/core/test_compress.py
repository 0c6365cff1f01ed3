"""From algorithms and batches to a compressed model: who takes turns, and what is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from turn_takers import LOG, SCHEME, Block, Halve, data, make

import ao_core as ao

pytestmark = pytest.mark.usefixtures("plain_environment", "turn_takers")

LAYERS = {"0", "1.0.up", "1.0.down", "1.1.up", "1.1.down", "2"}


def test_algorithms_take_turns_on_each_block():
    """One walk: each sees the block as those before it left it, and the next block sees the result."""
    model = make()
    report = ao.compress_(model, ["halve:only=up", Halve(only="1.1.up")], data(), scheme=SCHEME)
    assert LOG == [("halve", "1.0")] * 2 + [("halve", "1.1")] * 2 + [("halve", "")] * 2
    reference = make()
    for name in ("0", "1.0.up", "1.1.up", "1.1.up"):
        if name != "0":
            reference.get_submodule(name).weight.data /= 2
    ao.quantize_(reference, SCHEME)
    for name in LAYERS:
        mine, theirs = model.get_submodule(name).weight, reference.get_submodule(name).weight
        assert torch.equal(mine.dequantize(), theirs.dequantize()), name
    assert report.converted == dict.fromkeys(LAYERS, SCHEME)
    assert report.notes["1.0.up"]["tokens"] == 4
    with torch.no_grad():
        x = torch.cat([model[1][0](model[0](batch)) for batch in data()])
    # ... of the float layer 0: layers outside the blocks come last
    float_first = make()[0]
    with torch.no_grad():
        x = torch.cat([model[1][0](float_first(batch)) for batch in data()])
    assert report.notes["1.1.up"]["norm"] == pytest.approx(float(x.square().sum()), rel=1e-5)


def test_the_report():
    model = make()
    before = ao.model_bytes(model).total
    report = ao.compress_(model, "halve", data(), scheme=SCHEME, exclude=["1.0.*", "2"])
    assert isinstance(report, ao.CompressReport) and isinstance(report, ao.Report)
    assert set(report.converted) == {"0", "1.1.up", "1.1.down"}
    assert report.skipped["2"] == "excluded by rule '2'"
    weights = [model[0].weight, model[1][1].up.weight, model[1][1].down.weight]
    assert report.converted_bytes_before == 4 * sum(weight.numel() for weight in weights)
    assert report.converted_bytes_after == sum(map(ao.stored_bytes, weights))
    assert (report.bytes_before, report.bytes_after) == (before, ao.model_bytes(model).total)
    assert report.walk == "2 blocks of 1 in turn, then 1 layers outside them"
    assert "calibrated 2 blocks" in str(report)
    found = report.to_dict()
    assert found["notes"]["1.1.up"]["tokens"] == 4 and found["walk"] == report.walk
    assert report.plan.layers["1.1.up"].evidence["tokens"] == 4
    assert ao.Plan.from_json(report.plan.to_json()).layers == report.plan.layers


def test_what_an_algorithm_quantized_is_left_alone():
    model = make()
    report = ao.compress_(model, "quantize:scheme=int8-dynamic", data())
    assert report.converted == dict.fromkeys(LAYERS, "int8-dynamic")
    weight = make()[1][0].up.weight
    expected = ao.parse_scheme("int8-dynamic").quantize(weight.round(decimals=2))
    assert torch.equal(model[1][0].up.weight.codes, expected.codes)


def test_a_scheme_with_options_inside_an_algorithm():
    report = ao.compress_(make(), "quantize:scheme=(int8-weight-only:group_size=8)", data())
    assert set(report.converted.values()) == {"int8-weight-only:group_size=8"}


def test_without_a_scheme_weights_stay_in_float():
    model = make()
    report = ao.compress_(model, "halve", data(), include="1.*", exclude="*.down")
    assert report.converted == {}
    assert report.skipped["1.0.up"] == "no scheme was given: it stays in float"
    assert report.skipped["1.0.down"] == "excluded by rule '*.down'"
    assert report.skipped["0"] == "no rule matches it"
    assert torch.equal(model[1][1].up.weight, make()[1][1].up.weight / 2)
    assert torch.equal(model[1][1].down.weight, make()[1][1].down.weight)


def test_rules_and_plans():
    rules = [ao.Rule("*.up", SCHEME), ao.Rule("1.*", "int8-dynamic")]
    report = ao.compress_(make(), "halve", data(), scheme=rules)
    assert report.converted == {
        **dict.fromkeys(("1.0.up", "1.1.up"), SCHEME),
        **dict.fromkeys(("1.0.down", "1.1.down"), "int8-dynamic"),
    }
    plan = ao.resolve(make(), rules)
    assert ao.compress_(make(), "halve", data(), scheme=plan).converted == report.converted
    assert Halve().run(make(), plan, data()).converted == report.converted


def test_a_pinned_provider_is_kept():
    report = ao.compress_(make(), "halve", data(), scheme=[ao.Rule("*.up", SCHEME, provider="reference")])
    assert report.plan.layers["1.0.up"].provider == "reference"


def test_convolutions_and_embeddings_that_a_rule_names():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(36, 7)).eval()
    x = torch.randn(2, 3, 4, 4)
    before = model(x).detach()
    report = ao.compress_(model, "halve:only=nothing", [x], scheme=SCHEME, include=["0", "2"])
    assert set(report.converted) == {"0", "2"}
    assert ao.sqnr(before, model(x)) > 30


def test_tied_weights_stay_tied():
    model = make()
    model[1][1].up.weight = model[1][0].up.weight
    ao.compress_(model, "halve", data(), scheme=SCHEME)
    assert model[1][1].up.weight is model[1][0].up.weight
    assert isinstance(model[1][0].up.weight, ao.QuantizedTensor)


def test_an_algorithm_may_look_at_the_whole_model_before_its_first_block():
    """Every stage in float, whatever is done to one is undone, and only the real walk's notes remain."""

    class Looking(ao.BlockAlgorithm):
        name = "looking"

        def __init__(self, largest=None):
            self.largest = largest

        def prepared(self, survey):
            found = {}

            def look(stage):
                for name in stage.layers:
                    found[name] = float(stage.weight(name).abs().max())
                    stage.replace(name, stage.weight(name) * 0)
                    stage.note(name, looked=True)

            survey(look)
            return Looking(found)

        def visit(self, stage):
            for name in stage.layers:
                stage.note(name, largest=self.largest[name])

    model = make()
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    expected = {name: {"largest": float(it.weight.detach().abs().max())} for name, it in linears.items()}
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = ao.compress_(model, Looking(), data())
    assert dict(report.notes) == expected
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_an_algorithm_that_takes_the_whole_model():
    report = ao.compress_(make(), "alone", iter(data()), scheme=SCHEME)
    assert isinstance(report, ao.CompressReport) and report.walk == "by alone itself"
    assert report.converted["0"] == SCHEME
    assert LOG == [("alone", "2 batches")]
    report = ao.compress_(make(), "alone", data())
    assert report.skipped["0"] == "no scheme was given: it stays in float"
    with pytest.raises(ao.OptionError, match=r"'alone' takes the whole model for itself.*not with halve"):
        ao.compress_(make(), ["halve", "alone"], data(), scheme=SCHEME)


def test_names_and_texts():
    assert ao.algorithms()["halve"] is Halve
    assert ao.parse_algorithm("halve:only=up", fail="x") == Halve(only="up", fail="x")
    made = Halve()
    assert ao.parse_algorithm(made) is made


def test_layers_that_see_no_data():
    """They are quantized as without data, and the report says that they saw none."""

    class Unused(Block):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(17, 17)

    model = nn.Sequential(Unused(), Unused())
    report = ao.compress_(model, "halve:only=up", [torch.randn(4, 17)], scheme=SCHEME)
    assert report.notes["0.spare"]["tokens"] == 0
    assert report.converted["0.spare"] == SCHEME


def test_the_output_is_that_of_the_scheme():
    """With an algorithm that does nothing, compress_ is quantize_."""
    model, reference = make(), make()
    ao.compress_(model, "halve:only=nothing", data(), scheme="int8-dynamic")
    ao.quantize_(reference, "int8-dynamic")
    x = torch.randn(6, 5)
    assert torch.equal(model(x), reference(x))
    assert F.mse_loss(model(x), make()(x)) > 0
