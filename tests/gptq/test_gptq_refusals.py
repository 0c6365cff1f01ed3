"""What GPTQ refuses, and what it says about tokens, memory and bad numbers."""

from __future__ import annotations

import pytest
import torch
from small_models import data, inputs, model_of
from torch import nn

import ao_core as ao
from ao_gptq.algorithm import Gptq
from ao_gptq.factor import Factor


class Vocabulary(nn.Module):
    """A language model's outline: 50 tokens, 8 positions."""

    class Config:
        max_position_embeddings = 8

    config = Config()

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(50, 64), nn.Linear(64, 17)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        return self.linear(self.embed(input_ids))


def test_tokens_that_do_not_fit_the_model():
    def run(ids):
        ao.compress_(Vocabulary().eval(), "gptq:scheme=int8-weight-only", [ids])

    run(torch.arange(40).view(5, 8))
    with pytest.raises(ao.ModelError, match="batch 0 holds token 51, and the model's vocabulary has 50"):
        run(torch.arange(44, 52).view(1, 8))
    with pytest.raises(ao.ModelError, match="batch 0 holds token -1"):
        run(torch.full((1, 4), -1))
    with pytest.raises(ao.ModelError, match="sequences of 9 tokens, and the model takes 8"):
        run(torch.zeros(1, 9, dtype=torch.int64))


def test_activations_that_are_not_finite_name_the_layer():
    model, batches = model_of(), data()
    batches[1][0, 3, 5] = torch.inf
    before = dict(model.named_parameters())
    with pytest.raises(ao.ModelError, match=r"layer '0\.\w+' saw NaN or infinity"):
        ao.compress_(model, "gptq:scheme=int8-weight-only", batches)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_singular_hessian_is_damped_more_and_said():
    """Five tokens for 64 columns: no Cholesky factor without damping."""
    model = nn.Sequential(nn.Linear(64, 17)).eval()
    report = ao.compress_(model, "gptq:scheme=int4-weight-only,percdamp=0.0", [inputs(64, 5)])
    assert report.notes["0"]["percdamp"] > 0 and report.notes["0"]["gptq"] == "done"


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_runs_out_names_what_to_turn(kind, monkeypatch):
    def full(*args, **options):
        raise kind("tried to allocate 20 GiB")

    model = model_of()
    before = dict(model.named_parameters())
    monkeypatch.setattr(Factor, "of", staticmethod(full))
    with pytest.raises(ao.ModelError, match=r"memory ran out on cpu .* on 3 batches, .*--samples.*--context"):
        ao.compress_(model, "gptq:scheme=int8-weight-only", data())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_schemes_that_can_not_encode_a_column_are_refused_before_any_work():
    class Whole(type(ao.parse_scheme("int8-weight-only"))):
        def encode(self, weight, qparams):
            if weight.shape[-1] == 1:
                raise ValueError("whole weights only")
            return super().encode(weight, qparams)

    class Other(type(ao.parse_scheme("int8-weight-only"))):
        def encode(self, weight, qparams):
            return super().encode(weight - weight.mean(-1, keepdim=True), qparams)

    touched = []
    model = model_of()
    model.register_forward_pre_hook(lambda *_: touched.append(1))
    for scheme, words in (
        (Whole(), "ValueError: whole weights only"),
        (Other(), "another value than within"),
    ):
        with pytest.raises(ao.OptionError, match=words):
            ao.compress_(model, "gptq", data(), scheme=scheme)
        mixed = [ao.Rule("0.up", scheme), ao.Rule("*", "int4-weight-only")]
        with pytest.raises(ao.OptionError, match=f"gptq can't round '0.up'.*{words}"):
            ao.compress_(model, "gptq", data(), scheme=mixed)
    assert not touched


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Gptq(asymmetric=2), "asymmetric from 0 to 1, found 2"),
        (lambda: Gptq(min_tokens=0), "min_tokens 1 or more, found 0"),
        (lambda: Gptq(mse=1), "mse true or false, found 1"),
        (lambda: Gptq(percdamp=-1), "percdamp from 0 to 1, found -1"),
        (lambda: Gptq(block_size=0), "block_size 1 or more, found 0"),
        (lambda: Gptq(act_order="yes"), "act_order true or false, found 'yes'"),
        (lambda: ao.compress_(model_of(), "gptq", data()), "it needs a scheme to round to"),
        (lambda: ao.compress_(model_of(), "gptq:scheme=int8-weight-only", []), "batch"),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(ao.OptionError, match=words):
        call()


def test_a_damaged_weight_leaves_the_model_as_it_was():
    model = model_of()
    model[2].down.weight.data[3, 5] = torch.nan
    before = dict(model.named_parameters())
    with pytest.raises((ao.RejectedError, ao.ModelError)):
        ao.compress_(model, "gptq:scheme=int8-weight-only", data())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
