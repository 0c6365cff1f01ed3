"""Plans as JSON and in files, and what applying one checks."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from plan_models import (
    _schemes,  # noqa: F401 - registers the schemes for every test
    assert_unchanged,
    snapshot,
    two_blocks,
)
from torch import nn

import ao_core as ao
from ao_core.plan import plan_of

pytestmark = pytest.mark.usefixtures("plain_environment")


def test_plan_json_is_sorted_and_comes_back_whole():
    choices = {
        "b": ao.Choice("whole:block=(1, 2)", "torch", evidence={"ms": 0.25, "runs": [1, 2]}),
        "a": ao.Choice(None, reason="because"),
        "ä.ö": ao.Choice("half"),
    }
    plan = ao.Plan(choices)
    text = plan.to_json()
    again = ao.Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert list(again.layers) == ["a", "b", "ä.ö"]
    assert text == ao.Plan(dict(reversed(choices.items()))).to_json()
    data = json.loads(text)
    assert data["format"] == 1
    assert set(data["fingerprint"]) >= {"device", "torch", "python"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no plan"),
        ("[1]", "no plan"),
        ("{}", "no plan.*format"),
        ('{"format": 1}', "no plan.*layers"),
        ('{"format": 1, "layers": 3, "fingerprint": {}}', "no plan"),
        ('{"format": 1, "layers": {"a": {"x": 1}}, "fingerprint": {}}', "no plan.*'x'"),
        ('{"format": 1, "layers": {"a": 3}, "fingerprint": {}}', "no plan"),
        ('{"format": 2, "layers": {}}', "format 2, and this ao-core reads format 1"),
    ],
)
def test_what_is_no_plan(text, words):
    with pytest.raises(ao.PlanError, match=words):
        ao.Plan.from_json(text)


def test_plan_files(tmp_path):
    """Written whole, readable like any file; what can't be read is a PlanError."""
    plan = ao.resolve(two_blocks(), [ao.Rule("*", "whole")])
    path = tmp_path / "plan.json"
    plan.save(path)
    plan.save(path)
    assert ao.Plan.load(path) == plan
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    (tmp_path / "other").write_text("x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "newer").write_text('{"format": 2, "layers": {}}')
    for name in ("absent", "binary", "other", "newer"):
        with pytest.raises(ao.PlanError, match=f"{name}.*Give|{name}: "):
            ao.Plan.load(tmp_path / name)


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "plan.json"
    ao.Plan({"a": ao.Choice("whole")}).save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        ao.Plan({"a": ao.Choice("whole", evidence={"x": object()})}).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_applying_a_plan():
    """From one model to another of the same names; layers that it leaves alone stay."""
    plan = ao.resolve(two_blocks(), [ao.Rule("1.*", "whole", provider="torch")])
    model = two_blocks()
    report = ao.apply_(model, ao.Plan.from_json(plan.to_json()))
    assert set(report.converted) == {"1.q_proj", "1.k_proj"}
    assert model[1].q_proj.weight.provider == "torch"
    assert type(model[0].q_proj.weight) is nn.Parameter
    now = plan_of(model)
    assert {n: c.scheme for n, c in now.layers.items()} == {n: c.scheme for n, c in plan.layers.items()}
    assert now.layers["1.q_proj"].provider == "torch"
    with pytest.raises(ao.PlanError, match=r"2 layers .*can't convert: 1\.k_proj, 1\.q_proj"):
        ao.apply_(model, plan)


def test_applying_a_plan_of_another_model():
    model = two_blocks()
    before = snapshot(model)
    plan = ao.Plan({"0.q_proj": ao.Choice("whole"), "9.up": ao.Choice("whole"), "8": ao.Choice(None)})
    with pytest.raises(ao.PlanError, match=r"names 1 layers .*9\.up.*another model"):
        ao.apply_(model, plan)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("choice", "error"),
    [
        (ao.Choice("nowhere"), ao.UnknownNameError),
        (ao.Choice("whole:x=1"), ao.OptionError),
        (ao.Choice("half"), ao.RejectedError),
    ],
)
def test_applying_a_plan_that_cannot_be_done(choice, error):
    """An unknown scheme, an unknown option, a weight that the scheme rejects: nothing is converted."""
    model = two_blocks()
    before = snapshot(model)
    with pytest.raises(error):
        ao.apply_(model, ao.Plan({"0.q_proj": ao.Choice("whole"), "2": choice}))
    assert_unchanged(model, before)


def test_progress_is_on_standard_error(capsys):
    ao.quantize_(two_blocks(), "whole", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "quantizing" in captured.err


def measured_plan(**place):
    evidence = {"us": 3.0, "bytes": 10}
    plan = ao.Plan(
        {"0": ao.Choice("int8-weight-only", evidence=evidence)}, {**ao.fingerprint("cpu"), **place}
    )
    return ao.Plan.from_json(plan.to_json())


def test_a_plan_measured_elsewhere_says_so_once_and_is_applied():
    model = nn.Sequential(nn.Linear(32, 32))
    here = ao.fingerprint("cpu")
    plan = measured_plan(device="cuda", device_name="GPU X", torch="1.13.1")
    with pytest.warns(ao.PlanWarning) as caught:
        ao.apply_(model, plan)
    (warning,) = caught
    assert warning.filename == __file__
    for words in ("device was cuda, and is cpu", "GPU X", f"torch was 1.13.1, and is {here['torch']}"):
        assert words in str(warning.message)
    assert isinstance(model[0].weight, ao.QuantizedTensor)


def test_the_same_place_and_plans_without_times_are_applied_in_silence(recwarn):
    patch = ".".join([*torch.__version__.split(".")[:2], "99"])
    ao.apply_(nn.Sequential(nn.Linear(32, 32)), measured_plan(torch=patch, threads="77"))
    rules = ao.Plan({"0": ao.Choice("int8-weight-only")}, {"device": "cuda", "torch": "1.13"})
    ao.apply_(nn.Sequential(nn.Linear(32, 32)), rules)
    assert not recwarn.list


def test_what_was_measured_of_a_whole_plan_travels_with_it():
    plan = ao.Plan({"0": ao.Choice("int8-weight-only")}, evidence={"check": {"kl": 0.25}})
    assert ao.Plan.from_json(plan.to_json()) == plan
    assert "evidence" not in json.loads(ao.Plan({}).to_json())
