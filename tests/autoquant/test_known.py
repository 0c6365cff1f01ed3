"""Earlier searches, here and elsewhere: what is taken over, and what is measured again."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

import ao_core as ao
from ao_autoquant import Exploration, explore
from ao_autoquant import sensitivity as module
from ao_autoquant.known import load

OPTIONS = {"schemes": ["int8-weight-only", "uint4"], "isolate": False, "remeasure": True}


@pytest.fixture
def setting():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 10)).eval(), torch.randn(64, 32)


def elsewhere(found):
    """The same, as if measured on another device; its times are no times of here."""
    options = {
        layer: {name: dataclasses.replace(option, us=1e9) for name, option in each.items()}
        for layer, each in found.options.items()
    }
    return dataclasses.replace(found, options=options, fingerprint={**found.fingerprint, "device": "cuda"})


@pytest.mark.parametrize("error", ["output", "loss"])
def test_on_another_device_only_times_are_measured(setting, error, monkeypatch):
    model, x = setting
    first = explore(model, x, error=error, **OPTIONS)
    monkeypatch.setattr(module, "gradients", None)  # nothing may ask for them
    found = explore(model, x, error=error, known=elsewhere(first), **OPTIONS)
    for layer, options in found.options.items():
        for name, option in options.items():
            assert option.error == first.options[layer][name].error
            assert 0 < option.us < 1e6
    assert found.fingerprint == first.fingerprint


def test_in_the_same_place_nothing_is_measured(setting, tmp_path):
    model, x = setting
    first = explore(model, x, error="loss", **OPTIONS)
    first.save(tmp_path / "found.json")
    again = Exploration.load(tmp_path / "found.json")
    assert again == first
    found = explore(model, x, error="loss", known=again, **OPTIONS)
    assert found.measured == 0 and found.options == first.options


def test_of_another_model_or_measure_nothing_is_taken(setting):
    model, x = setting
    first = explore(model, x, **OPTIONS)
    other = dataclasses.replace(
        first,
        options={
            layer: {name: dataclasses.replace(option, error=77.0) for name, option in each.items()}
            for layer, each in first.options.items()
        },
    )
    found = explore(model, x, error="loss", known=other, **OPTIONS)
    assert all(option.error < 1 for each in found.options.values() for option in each.values())
    with torch.no_grad():
        model[2].bias += 1
    found = explore(model, x, known=other, **OPTIONS)
    assert all(option.error < 1 for each in found.options.values() for option in each.values())
    assert explore(model, x, known=first, **OPTIONS).measured == first.measured


def test_a_plan_knows_what_it_chose(setting, tmp_path):
    model, x = setting
    first = explore(model, x, error="loss", **OPTIONS)
    first.plan("bytes").save(tmp_path / "plan.json")
    found = explore(model, x, error="loss", known=load(tmp_path / "plan.json"), **OPTIONS)
    assert found.measured == 2 * 3  # time, error and nats of the scheme that the plan did not choose
    for layer in first.options:
        for name in ("float", "uint4"):
            assert found.options[layer][name] == first.options[layer][name]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json", "can't be read"),
        ('{"options": {}}', "no exploration"),
        ('{"options": {}, "format": 9}', "format 9"),
        ('{"a": 1}', "no plan"),
        ("[1]", "no plan"),
    ],
)
def test_files_that_hold_something_else(tmp_path, text, words):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ao.PlanError, match=words):
        load(tmp_path / "file")


def test_a_plan_is_no_exploration(tmp_path):
    ao.Plan({}).save(tmp_path / "plan.json")
    with pytest.raises(ao.PlanError, match="is a plan"):
        Exploration.load(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["layers"] == {}
