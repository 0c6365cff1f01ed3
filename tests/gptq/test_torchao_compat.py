"""torchao's names for GPTQ."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import data, inputs, model_of
from torch import nn

import ao_core as ao
from ao_gptq.torchao_compat import (
    GPTQQuantizer,
    InputRecorder,
    Int4WeightOnlyGPTQQuantizer,
    Int8DynActInt4WeightGPTQQuantizer,
    MultiInput,
)


def lost(expected, model, x):
    return ao.sqnr(expected, model(x))


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        (Int4WeightOnlyGPTQQuantizer, "int4-weight-only:group_size=32"),
        (Int8DynActInt4WeightGPTQQuantizer, "int8-dynamic-int4-weight:group_size=32"),
    ],
)
def test_quantizers(kind, scheme):
    model, unseen = model_of(), inputs(64, 300, 9)
    expected, rounded = model(unseen).detach(), copy.deepcopy(model)
    ao.quantize_(rounded, scheme)
    made = kind(blocksize=64, percdamp=0.01, groupsize=32).quantize(model, [MultiInput(data())])
    assert made is model and type(model[0].up.weight) is type(rounded[0].up.weight)
    assert lost(expected, model, unseen) > lost(expected, rounded, unseen) + 0.5


def test_multi_input():
    made = MultiInput([1, 2, 3])
    assert len(made) == 3 and made[:2].values == [1, 2]
    assert made.add_input(4).values == [1, 2, 3, 4]


def test_input_recorder():
    class Letters:
        def encode(self, text):
            return [ord(letter) % 50 for letter in text]

    texts = ["one text " * 20, "another " * 20]
    recorder = InputRecorder(Letters(), 32, vocab_size=50)
    assert recorder.get_inputs() is None
    (found,) = recorder.record_inputs(texts, 4).get_inputs()
    assert [row.shape for row in found.values] == [(1, 32)] * 4
    assert torch.cat(found.values, 1).flatten().tolist() == Letters().encode("\n\n".join(texts))[:128]
    with pytest.raises(ao.OptionError, match="the tokenizer gave token 49, and vocab_size is 40"):
        InputRecorder(Letters(), 32, vocab_size=40).record_inputs(["c" * 64])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "a list with a MultiInput for each argument"),
        ([torch.ones(1)], "a list with a MultiInput for each argument"),
        ([MultiInput([1]), MultiInput([1, 2])], "as many values, and there are 1, 2"),
    ],
)
def test_inputs_that_are_refused(given, words):
    with pytest.raises(ao.OptionError, match=words):
        Int4WeightOnlyGPTQQuantizer().quantize(model_of(), given)


class Symmetric(GPTQQuantizer):
    """int4 in groups, as a user of torchao would write it."""

    def __init__(self, skipped=()):
        self.get_qparams_func = lambda w, size: [w.float().abs().amax(1, keepdim=True) / 7.5]
        self.quantize_func = lambda w, q, size: (w / q[0]).round().clamp(-8, 7).to(torch.int8)
        self.dequantize_func = lambda codes, q, size: codes.float() * q[0]
        self.combine_qparams_list_func = lambda listed: [torch.cat([q[0] for q in listed], 1)]
        self.make_names_and_values_dict_func = lambda codes, q: {"codes": codes, "scales": q[0]}
        self.skip_layer_func = lambda weight: weight.shape in skipped

    def quantize(self, model, inputs):
        return self._create_quantized_state_dict(model, inputs, blocksize=32, groupsize=32)


def test_the_contract_of_functions():
    model, unseen = model_of(), inputs(64, 300, 9)
    before = dict(model.named_parameters())
    expected = model(unseen).detach()
    state = Symmetric(skipped=[(64, 100)]).quantize(model, [MultiInput(data())])
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert "0.down.weight" in state and "0.up.weight" not in state and "0.up.bias" in state
    assert state["1.up.codes"].shape == (100, 64) and state["1.up.scales"].shape == (100, 2)

    rounded, solved = copy.deepcopy(model), copy.deepcopy(model)
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and not name.endswith("down"):
            groups = linear.weight.detach().view(100, 2, 32)
            scales = groups.abs().amax(-1, keepdim=True) / 7.5
            nearest = (groups / scales).round().clamp(-8, 7) * scales
            rounded.get_submodule(name).weight.data = nearest.view(100, 64)
            values = state[f"{name}.codes"].view(100, 2, 32) * state[f"{name}.scales"].unsqueeze(-1)
            solved.get_submodule(name).weight.data = values.view(100, 64)
    assert lost(expected, solved, unseen) > lost(expected, rounded, unseen) + 1


def test_what_a_subclass_must_write():
    for method in ("quantize", "_convert_for_runtime"):
        with pytest.raises(NotImplementedError, match=f"{method} must be written"):
            getattr(GPTQQuantizer(), method)(*[None] * (2 if method == "quantize" else 1))
