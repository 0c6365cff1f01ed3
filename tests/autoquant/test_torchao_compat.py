"""torchao's three calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ao_core as ao
from ao_autoquant import torchao_compat as compat


def test_the_one_line(examples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 63), nn.ReLU(), nn.Linear(63, 17)).train()
    exact = model(examples)
    found = compat.autoquant(model, [examples])
    assert found is model and model.training
    assert ao.sqnr(exact.detach(), found(examples).detach()) > 30
    assert not model[0]._forward_pre_hooks


def test_two_steps_over_several_inputs(model, examples, monkeypatch):
    compat.change_linears_to_autoquantizable(model, schemes=["uint4"])
    model(examples)
    model(examples[:1])
    with pytest.raises(ao.OptionError, match="already"):
        compat.change_linears_to_autoquantizable(model)
    assert compat.change_autoquantizable_to_quantized(model) is model
    with pytest.raises(ao.OptionError, match="not autoquantizable"):
        compat.change_autoquantizable_to_quantized(model)


def test_linears_that_saw_nothing(model, examples):
    compat.change_linears_to_autoquantizable(model, filter_fn=lambda module, name: name == "2")
    with pytest.raises(ao.ModelError, match="1 linears saw no input: 2"):
        compat.change_autoquantizable_to_quantized(model)
    compat.change_autoquantizable_to_quantized(model, error_on_unseen=False)
    assert not isinstance(model[2].weight, ao.QuantizedTensor)


def test_bad_calls(model, examples):
    with pytest.raises(ao.OptionError, match="example_input is a str"):
        compat.autoquant(model, "text")
    with pytest.raises(ao.OptionError, match="no option mode"):
        compat.autoquant(model, examples, mode=["relu", None])
    assert isinstance(compat.autoquant(model, examples), nn.Module)  # nothing was left behind
