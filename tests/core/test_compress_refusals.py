"""What compress_ refuses, and that a model is as it was when something fails."""

from __future__ import annotations

import pytest
import torch
from turn_takers import LOG, SCHEME, Halve, data, make

import ao_core as ao

pytestmark = pytest.mark.usefixtures("plain_environment", "turn_takers")


@pytest.mark.parametrize("stop", ["1.0", "1.1", ""])
def test_an_error_leaves_the_model_as_it_was(stop):
    model = make()
    before, state = dict(model.named_parameters()), {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="it failed"):
        ao.compress_(model, ["halve", Halve(fail=stop or "?")], data(), scheme=SCHEME) if stop else (
            ao.compress_(model, ["halve", LateError()], data(), scheme=SCHEME)
        )
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, state[name])
    assert model.training


class LateError(ao.BlockAlgorithm):
    name = "late"

    def visit(self, stage):
        if not stage.name:
            raise RuntimeError("it failed")


def test_a_weight_that_becomes_infinite_is_refused():
    model = make()

    class Burst(ao.BlockAlgorithm):
        name = "burst"

        def visit(self, stage):
            if stage.name == "1.1":
                stage.replace("1.1.up", stage.weight("1.1.up") * torch.inf)

    with pytest.raises(ao.RejectedError, match="NaN or infinite"):
        ao.compress_(model, Burst(), data(), scheme=SCHEME)
    assert torch.equal(model[1][0].up.weight, make()[1][0].up.weight)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"algorithms": []}, ao.OptionError, "no algorithm was given"),
        ({"algorithms": "havle"}, ao.UnknownNameError, r"unknown algorithm 'havle'. Did you mean 'halve'"),
        ({"algorithms": "halve:size=3"}, ao.OptionError, r"'halve' has no option 'size'; it has only, fail"),
        ({"algorithms": "alone:size=3"}, ao.OptionError, r"'alone' has no option 'size'; it has none"),
        ({"algorithms": "halve:only"}, ao.OptionError, "'only' has no '='"),
        ({"batches": []}, ao.OptionError, "the list of batches is empty"),
        ({"scheme": "int9"}, ao.UnknownNameError, "unknown scheme 'int9'"),
        ({"include": "9*"}, ao.PlanError, "rule '9\\*' matches none"),
        ({"scheme": None, "include": "9*"}, ao.PlanError, "rule '9\\*' matches none"),
        ({"scheme": None, "algorithms": "quantize"}, ao.OptionError, "quantize can't be applied: it needs"),
        ({"algorithms": "quantize:scheme=int8-dynamic"}, ao.OptionError, "several schemes were given"),
        ({"scheme": [ao.Rule("*", SCHEME)], "include": "0"}, ao.PlanError, "takes no options, include"),
        ({"scheme": "plan", "exclude": "0"}, ao.OptionError, "a plan takes no include or exclude"),
        ({"device": "meta"}, ao.OptionError, "device='meta' holds no values"),
        ({"device": "cuda:99"}, ao.OptionError, "device='cuda:99' can't be used: .*Leave it out"),
        ({"device": "toaster"}, ao.OptionError, "device='toaster' can't be used: .*Leave it out"),
    ],
)
def test_what_is_refused_before_anything_changes(call, error, words):
    model = make()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    given = {"algorithms": "halve", "batches": data(), "scheme": SCHEME, **call}
    if given["scheme"] == "plan":
        given["scheme"] = ao.resolve(model, [ao.Rule("*", SCHEME)])
    with pytest.raises(error, match=words):
        ao.compress_(model, **given)
    assert LOG == []
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


def test_a_damaged_weight_is_refused_before_anything_changes():
    model = make()
    model[1][1].down.weight.data[2, 3] = torch.nan
    with pytest.raises(ao.RejectedError, match=r"layer '1.1.down'.*1 of its 391 values"):
        ao.compress_(model, "halve", data(), scheme=SCHEME)
    assert LOG == []
