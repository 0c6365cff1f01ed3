"""Which weights are converted, which are left alone and why; a failure changes nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from plan_models import (
    SOURCE,
    Whole,
    WholeTensor,
    _schemes,  # noqa: F401 - registers the schemes for every test
    assert_unchanged,
    snapshot,
    two_blocks,
    whole_weights,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import ao_core as ao
from ao_core.scheme import SCHEMES

pytestmark = pytest.mark.usefixtures("plain_environment")


class Tied(nn.Module):
    """An embedding, a head and a copy of the head that share one weight."""

    def __init__(self, *, embedding=True):
        super().__init__()
        self.embed, self.head, self.copy = nn.Embedding(33, 17), nn.Linear(17, 33), nn.Linear(17, 33)
        self.body = nn.Linear(17, 17)
        self.copy.weight = self.head.weight
        if embedding:
            self.embed.weight = self.head.weight

    def forward(self, indices):
        x = self.body(self.embed(indices))
        return self.head(x) + self.copy(x)


def bytes_of(model):
    """An independent count: every tensor that the model holds, by identity, inner tensors for quantized."""
    held = {}
    for tensor in (*model.parameters(), *model.buffers()):
        inner = tensor.stored().values() if isinstance(tensor, ao.QuantizedTensor) else [tensor]
        held |= {each.data_ptr(): each.numel() * each.element_size() for each in inner}
    return sum(held.values())


def test_tied_linears_are_converted_once_and_stay_tied():
    model = whole_weights(Tied(embedding=False))
    indices = torch.tensor([[0, 32], [5, 5]])
    expected = model(indices)
    report = ao.quantize_(model, "whole")
    assert model.head.weight is model.copy.weight
    assert isinstance(model.head.weight, WholeTensor)
    assert set(report.converted) == {"head", "body"}
    assert report.bytes_after == bytes_of(model) == (33 * 17 + 17 * 17) + 4 * (33 * 17 + 33 + 33 + 17)
    assert torch.equal(model(indices), expected)


def test_either_name_of_a_tied_linear_speaks_of_it():
    model = whole_weights(Tied(embedding=False))
    assert set(ao.quantize_(model, "whole", include="copy").converted) == {"head"}
    assert model.head.weight is model.copy.weight


def test_a_head_tied_to_the_embedding_is_left_alone():
    """And reported, with what to do."""
    model = whole_weights(Tied())
    report = ao.quantize_(model, "whole")
    assert report.converted == {"body": "whole"}
    assert "tied to embed; name it in a rule" in report.skipped["head"]
    assert report.skipped["embed"] == "it shares the weight of head"
    assert model.head.weight is model.embed.weight
    assert type(model.head.weight) is nn.Parameter


def test_a_head_tied_to_the_embedding_is_converted_when_named():
    """Head, copy and embedding hold one quantized weight, and ``F.embedding`` looks it up."""
    model = whole_weights(Tied())
    indices = torch.tensor([[0, 32], [5, 5]])
    expected, rows = model(indices), model.embed(indices)
    report = ao.quantize_(model, "whole", include=["head", "body"])
    assert isinstance(model.embed.weight, WholeTensor)
    assert model.embed.weight is model.head.weight is model.copy.weight
    assert torch.equal(F.embedding(indices, model.embed.weight), rows)
    assert torch.equal(model(indices), expected)
    assert report.converted == {"head": "whole", "body": "whole"}
    assert report.skipped == {"embed": "it shares the weight of head, which is converted"}


def test_multihead_attention_is_left_alone_and_runs():
    """It does not call its linears; the feed-forward layers beside it are converted."""
    model = nn.TransformerEncoderLayer(16, 4, dim_feedforward=33, batch_first=True)
    model = whole_weights(model)
    x = torch.randint(-2, 3, (2, 5, 16)).float()
    with torch.no_grad():
        expected = model(x)
        report = ao.quantize_(model, "whole")
        assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    assert set(report.converted) == {"linear1", "linear2"}
    assert set(report.skipped) == {"self_attn.in_proj_weight", "self_attn.out_proj"}
    for reason in report.skipped.values():
        assert "nn.MultiheadAttention 'self_attn'" in reason
    assert type(model.self_attn.out_proj.weight) is nn.Parameter


def test_parametrized_layers_are_reported():
    """New and old style; their computed weight must not be replaced."""
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("new", "plain")})
    parametrizations.weight_norm(model["new"])
    x = torch.ones(2, 8)
    expected = model["new"](x)
    report = ao.quantize_(model, "whole")
    assert report.converted == {"plain": "whole"}
    assert list(report.skipped) == ["new"]
    assert "remove_parametrizations" in report.skipped["new"]
    assert torch.equal(model["new"](x), expected)
    parametrize.remove_parametrizations(model["new"], "weight")
    assert "new" in ao.quantize_(model, "whole").converted


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_of_the_old_style_is_reported():
    model = nn.ModuleDict({"old": weight_norm(nn.Linear(8, 8)), "plain": nn.Linear(8, 8)})
    report = ao.quantize_(model, "whole")
    assert report.converted == {"plain": "whole"}
    assert "not the weight" in report.skipped["old.weight_v"]


def test_quantized_layers_are_reported_and_not_doubled():
    model = two_blocks()
    ao.quantize_(model, "whole", include="0.*")
    first = model[0].q_proj.weight
    report = ao.quantize_(model, "half")
    assert model[0].q_proj.weight is first
    assert report.converted == {"1.k_proj": "half", "1.q_proj": "half"}
    assert report.skipped["0.q_proj"] == "it is quantized already (whole)"
    with pytest.raises(ao.PlanError, match=r"no layer that can be converted.*quantized already"):
        ao.quantize_(model, "half")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.ReLU()), "it has no weight of two dimensions"),
        (nn.Sequential(nn.Conv1d(3, 5, 2)), "0: convolution weights are converted only where a rule names"),
        (nn.Sequential(nn.Bilinear(3, 5, 2)), "0: it belongs to Bilinear"),
        (nn.Sequential(nn.Linear(3, 3)), "0: it has fewer than 4 columns"),
        (nn.Sequential(nn.Linear(8, 8).double()), "0: its dtype is torch.float64"),
        (nn.Sequential(nn.Linear(8, 8, device="meta")), "0: it lies on the meta device"),
        (nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)]), "and 5 more"),
    ],
)
def test_a_model_without_a_convertible_layer(model, why):
    with pytest.raises(ao.PlanError, match=f"Sequential has no layer that can be converted: .*{why}"):
        ao.quantize_(model, "whole")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(bad):
    """The error names the layer, and the model keeps every bit."""
    model = two_blocks()
    model[1].k_proj.weight.data[3, 5] = bad
    before = snapshot(model)
    with pytest.raises(ao.RejectedError, match=r"layer '1\.k_proj': .*1 of its 85 values.*not changed"):
        ao.quantize_(model, "whole")
    assert_unchanged(model, before)
    ao.quantize_(model, "whole", exclude="1.k_proj")


def test_a_provider_that_nobody_has_changes_nothing():
    model = whole_weights(nn.Sequential(nn.Linear(17, 33), nn.Linear(33, 17)))
    rules = [ao.Rule("0", "whole"), ao.Rule("1", "whole", provider="tritn")]
    with pytest.raises(ao.UnknownNameError, match=r"'tritn'; there are .*reference"):
        ao.quantize_(model, rules)
    with pytest.raises(ao.UnknownNameError, match="tritn"):
        ao.apply_(model, ao.resolve(model, rules))
    assert not any(isinstance(each, ao.QuantizedTensor) for each in model.parameters())


def test_a_scheme_that_raises_midway_changes_nothing():
    calls = []

    @dataclass(frozen=True)
    class Tiring(Whole):
        """Gives up at the third layer."""

        name: ClassVar[str] = "tiring"

        def pack(self, codes, qparams, *, dtype):
            calls.append(codes.shape)
            if len(calls) == 3:
                raise MemoryError("no more")
            return super().pack(codes, qparams, dtype=dtype)

    SCHEMES.add("tiring", Tiring, SOURCE)
    model = two_blocks()
    before = snapshot(model)
    with pytest.raises(MemoryError, match="no more"):
        ao.quantize_(model, "tiring")
    assert len(calls) == 3
    assert_unchanged(model, before)


def test_the_weight_is_not_needed_afterwards():
    """Nothing of the float weight is kept alive or shared."""
    model = two_blocks()
    old = model[0].q_proj.weight
    ao.quantize_(model, "whole")
    codes = model[0].q_proj.weight.codes.clone()
    old.data.fill_(0)
    assert torch.equal(model[0].q_proj.weight.codes, codes)


def test_a_bare_linear():
    """The root itself is the layer; its name is empty."""
    model = whole_weights(nn.Linear(17, 5))
    x = torch.ones(3, 17)
    expected = model(x)
    report = ao.quantize_(model, "whole")
    assert report.converted == {"": "whole"}
    assert torch.equal(model(x), expected)
    assert ao.Plan.from_json(report.plan.to_json()) == report.plan


def test_report_counts_bytes():
    """Against a count of our own: the whole model, and the converted weights."""
    model = nn.Sequential(two_blocks(), nn.Embedding(11, 17)).bfloat16()
    model.register_buffer("table", torch.ones(13, dtype=torch.float64), persistent=False)
    before = bytes_of(model)
    report = ao.quantize_(model, "whole")
    elements = 2 * (17 * 17 + 5 * 17)
    assert (report.bytes_before, report.bytes_after) == (before, bytes_of(model))
    assert report.bytes_before - report.bytes_after == elements
    assert (report.converted_bytes_before, report.converted_bytes_after) == (2 * elements, elements)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["converted"] == report.converted
    assert data["skipped"] == report.skipped
    assert data["bytes_after"] == report.bytes_after
    text = str(report)
    assert "4 layers converted, 2 left alone" in text
    assert all(name in text for name in report.skipped)
