"""Rules become a plan, schemes come from text, and a plan is JSON there and back."""

from __future__ import annotations

import json

import pytest
import torch
from plan_models import (
    Whole,
    WholeTensor,
    _schemes,  # noqa: F401 - registers the schemes for every test
    assert_unchanged,
    snapshot,
    two_blocks,
)
from torch import nn

import ao_core as ao

pytestmark = pytest.mark.usefixtures("plain_environment")


def test_the_first_rule_that_matches_wins():
    plan = ao.resolve(
        two_blocks(),
        [
            ao.Rule("1.q_proj", "half"),
            ao.Rule("re:[01]\\.q_proj", "whole:largest=3", provider="torch"),
            ao.Rule("*k_proj", None),
            ao.Rule("*", "whole"),
        ],
    )
    assert {name: (c.scheme, c.provider, c.reason) for name, c in plan.layers.items()} == {
        "0.k_proj": (None, None, "excluded by rule '*k_proj'"),
        "0.q_proj": ("whole:largest=3", "torch", ""),
        "1.k_proj": (None, None, "excluded by rule '*k_proj'"),
        "1.q_proj": ("half", None, ""),
        "2": (None, None, "it has fewer than 4 columns"),
    }
    assert list(plan.layers) == sorted(plan.layers)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("0.q_proj", ["0.q_proj"]),
        ("*proj", ["0.k_proj", "0.q_proj", "1.k_proj", "1.q_proj"]),
        ("?.[qv]_proj", ["0.q_proj", "1.q_proj"]),
        ("1.*", ["1.k_proj", "1.q_proj"]),
        (r"re:\d\.q.*", ["0.q_proj", "1.q_proj"]),
        ("re:.*(0.k|1.q)_proj", ["0.k_proj", "1.q_proj"]),
    ],
)
def test_patterns_cover_the_whole_name(pattern, matches):
    plan = ao.resolve(two_blocks(), [ao.Rule(pattern, "whole")])
    assert [name for name, choice in plan.layers.items() if choice.scheme] == matches
    left = {name: choice.reason for name, choice in plan.layers.items() if not choice.scheme}
    assert set(left.values()) == {"no rule matches it"}


@pytest.mark.parametrize("pattern", ["q_proj", "*Q_PROJ", "re:q_proj", "re:0\\.q", "3", ""])
def test_a_rule_that_matches_nothing_is_an_error(pattern):
    """Also one that excludes; the names that there are help."""
    for rules in ([ao.Rule(pattern, "whole")], [ao.Rule(pattern, None), ao.Rule("*", "whole")]):
        with pytest.raises(ao.PlanError, match=r"matches none of the 5 layers.*0\.q_proj.*\*q_proj"):
            ao.resolve(two_blocks(), rules)


def test_a_pattern_that_is_no_expression():
    with pytest.raises(ao.PlanError, match=r"'re:\(' is no regular expression"):
        ao.quantize_(two_blocks(), "whole", include="re:(")


def test_a_rule_that_matches_only_what_cannot_be_converted():
    """Is an error with the reason, unless it leaves them alone anyway."""
    model = nn.ModuleDict({"conv": nn.Bilinear(3, 5, 2), "lin": nn.Linear(8, 8)})
    with pytest.raises(
        ao.PlanError, match=r"only what can't be converted: conv: .*Bilinear, which is no nn.Linear"
    ):
        ao.resolve(model, [ao.Rule("conv", "whole"), ao.Rule("*", "whole")])
    plan = ao.resolve(model, [ao.Rule("conv", None), ao.Rule("*", "whole")])
    assert plan.layers["lin"].scheme == "whole"


def test_rules_are_needed():
    with pytest.raises(ao.PlanError, match="no rules were given"):
        ao.resolve(two_blocks(), [])
    with pytest.raises(ao.PlanError, match="takes no options, include or exclude"):
        ao.quantize_(two_blocks(), [ao.Rule("*", "whole")], include="*")


@pytest.mark.parametrize("given", [None, 8, ["whole"], ao.Scheme, {"0": "whole"}])
def test_what_is_no_scheme_is_refused(given):
    with pytest.raises(ao.OptionError, match=r"a scheme is its text, .* was given"):
        ao.quantize_(two_blocks(), given)


def test_include_and_exclude():
    """``exclude`` wins; both take one pattern or several."""
    report = ao.quantize_(two_blocks(), "whole", include=["*q_proj", "1.*"], exclude="1.k*", largest=5)
    assert report.converted == dict.fromkeys(["0.q_proj", "1.q_proj"], "whole:largest=5")
    assert report.skipped == {
        "0.k_proj": "no rule matches it",
        "1.k_proj": "excluded by rule '1.k*'",
        "2": "no rule matches it",
    }


def test_conversion_is_exact_and_in_place():
    model = two_blocks()
    before = snapshot(model)
    x = torch.randint(-3, 4, (5, 17)).float()
    expected = [model[0].q_proj(x), model[1].k_proj(x)]
    bias = model[0].q_proj.bias
    ao.quantize_(model, "whole")
    assert torch.equal(model[0].q_proj(x), expected[0])
    assert torch.equal(model[1].k_proj(x), expected[1])
    weight = model[0].q_proj.weight
    assert isinstance(weight, nn.Parameter) and isinstance(weight, WholeTensor)
    assert torch.equal(weight.codes, before["0.q_proj.weight"].to(torch.int8))
    assert weight.scheme == "whole" and not weight.requires_grad
    assert model[0].q_proj.bias is bias and bias.requires_grad
    assert type(model[2].weight) is nn.Parameter


@pytest.mark.parametrize("scheme", ["whole:largest=7,block=(2, 3)", Whole(largest=7, block=(2, 3))])
def test_a_scheme_or_its_text(scheme):
    model = two_blocks()
    report = ao.quantize_(model, scheme, include="0.q_proj")
    assert report.converted == {"0.q_proj": "whole:largest=7,block=(2, 3)"}
    assert model[0].q_proj.weight.codes.abs().max() == 7
    assert ao.parse_scheme(report.converted["0.q_proj"]) == Whole(largest=7, block=(2, 3))


def test_options_are_added_to_a_scheme():
    assert ao.parse_scheme(Whole(block=(4,)), largest=3) == Whole(largest=3, block=(4,))
    assert ao.parse_scheme("whole:largest=9,block=[4, 5]", largest=3) == Whole(largest=3, block=(4, 5))


@pytest.mark.parametrize("scheme", ["whole", Whole()])
def test_an_unknown_option(scheme):
    model = two_blocks()
    before = snapshot(model)
    with pytest.raises(ao.OptionError, match="'whole' has no option 'group'; it has largest, block"):
        ao.quantize_(model, scheme, group=3)
    assert_unchanged(model, before)


def test_options_that_cannot_be_read():
    with pytest.raises(ao.OptionError, match="'largest' has no '='"):
        ao.parse_scheme("whole:largest")
    with pytest.raises(ao.OptionError, match="no option 'larg'"):
        ao.parse_scheme("whole:larg=3")


def test_scheme_dict_round_trip_through_json():
    scheme = Whole(largest=3, block=(1, 2))
    data = json.loads(json.dumps(scheme.to_dict()))
    assert Whole.from_dict(data) == scheme
    for change in ({"version": 2}, {"name": "half"}):
        with pytest.raises(ao.OptionError, match="the installed scheme is 'whole' version 1"):
            Whole.from_dict({**data, **change})
