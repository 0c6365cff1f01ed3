"""Weights that are no linear's: embeddings, convolutions, expert stacks, with every scheme that fits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ao_core as ao

DENSE = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
EVERY = [name for name in sorted(ao.schemes()) if ao.parse_scheme(name).rejects_values(DENSE) is None]
WEIGHT_ONLY = [name for name in EVERY if ao.parse_scheme(name).weight_only and name != "ternary"]
DYNAMIC = [name for name in EVERY if not ao.parse_scheme(name).weight_only]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 100)
        self.body = nn.Linear(100, 100)
        self.head = nn.Linear(100, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


def dequantized(model):
    """The same model with float weights of the quantized ones' values."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, ao.QuantizedTensor):
                module.register_parameter(name, nn.Parameter(parameter.dequantize(), requires_grad=False))
    return plain


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_an_embedding_alone(scheme):
    model = nn.Sequential(nn.Embedding(50, 100), nn.Linear(100, 17)).eval()
    ids = torch.randint(0, 50, (3, 7))
    left = ao.quantize_(copy.deepcopy(model), scheme)
    assert left.skipped["0"] == "embedding weights are converted only where a rule names them"
    report = ao.quantize_(model, scheme, include=["*", "0"])
    assert set(report.converted) == {"0", "1"}
    torch.testing.assert_close(model(ids), dequantized(model)(ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(model[0](ids), model[0].weight.dequantize()[ids])


def test_an_embedding_that_writes_to_itself_is_left_alone():
    model = nn.Sequential(nn.Embedding(50, 64, max_norm=1.0), nn.Linear(64, 64))
    assert ao.quantize_(model, "int8-weight-only").skipped["0"].startswith("its max_norm rewrites rows")


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_an_embedding_that_is_tied_to_the_head_stays_tied(scheme, tmp_path):
    model = Tied().eval()
    ao.quantize_(model, scheme, include="embed")
    assert isinstance(model.embed.weight, ao.QuantizedTensor)
    assert model.embed.weight is model.head.weight
    ids = torch.randint(0, 50, (3, 7))
    out = model(ids)
    torch.testing.assert_close(out, dequantized(model)(ids), rtol=1e-4, atol=1e-4)
    ao.save(model, tmp_path / "saved")
    again = ao.load(tmp_path / "saved", model=Tied)
    assert again.embed.weight is again.head.weight
    assert torch.equal(again(ids), out)


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_activations_can_not_be_quantized_there(scheme):
    """An embedding has none, and a convolution's are no rows of a matrix: the reason is said."""
    for model, kind in (
        (nn.Sequential(nn.Embedding(50, 64)), "embedding"), (nn.Sequential(nn.Conv2d(3, 4, 3)), "convolution")
    ):  # fmt: skip
        with pytest.raises(ao.PlanError, match=f"{scheme} quantizes activations, which the {kind} does not"):
            ao.quantize_(model, scheme, include="0")
    with pytest.raises(ao.PlanError, match=r"head: .* quantizes activations, which the embedding does not"):
        ao.quantize_(Tied(), scheme, include="head")


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_convolutions(scheme, tmp_path):
    """Strided, padded and grouped; saved, compiled, cast, and with gradients for the input."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 16, 5, padding=2, groups=4, dilation=1), nn.Conv2d(16, 8, 1),
        ).eval()  # fmt: skip

    model = build()
    report = ao.quantize_(model, scheme, include=["0", "2", "3"])
    assert set(report.converted) == {"0", "2", "3"}
    assert ao.stored_bytes(model[2].weight) < model[2].weight.numel() * 2
    x = torch.randn(2, 3, 17, 13)
    out, plain = model(x), dequantized(model)
    torch.testing.assert_close(out, plain(x), rtol=1e-4, atol=1e-5)
    grads = []
    for each in (model, plain):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    ao.save(model, tmp_path / "saved")
    assert torch.equal(ao.load(tmp_path / "saved", model=build)(x), out)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), out)
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert moved(x.bfloat16()).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def mixtral():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("scheme", EVERY)
@torch.no_grad()
def test_experts_of_a_mixture(mixtral, scheme, way):
    """All stacks ``[E, N, K]`` are converted, and run by each of transformers' ways to call them."""
    model = copy.deepcopy(mixtral)
    report = ao.quantize_(model, scheme)
    stacks = [name for name in report.converted if "experts" in name]
    assert len(stacks) == 4 and not any("experts" in name for name in report.skipped)
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = dequantized(model)
    for each in (model, plain):
        each.set_experts_implementation(way)
    expected, found = plain(ids).logits, model(ids).logits
    needed = 60.0 if ao.parse_scheme(scheme).weight_only else 18.0  # few experts, routed by rounded inputs
    assert ao.sqnr(expected, found) > needed


def test_experts_are_left_alone_by_name(mixtral):
    model = copy.deepcopy(mixtral)
    report = ao.quantize_(model, "int8-weight-only", exclude="*experts*")
    assert not any("experts" in name for name in report.converted)
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == "excluded by rule '*experts*'"


def test_position_tables_are_no_experts():
    """Three dimensions alone do not make a stack of weights."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 16, 64))
            self.linear = nn.Linear(64, 64)

    report = ao.quantize_(Positions(), "int8-weight-only")
    assert report.skipped["table"] == "it belongs to Positions, which is no nn.Linear"


@pytest.mark.parametrize("scheme", EVERY)
def test_an_input_scale(scheme, tmp_path):
    """``linear(x) == base.linear(x * scale)``; copies, casts, files and graphs keep it."""
    linear = nn.Linear(100, 17)
    base = ao.parse_scheme(scheme).quantize(linear.weight)
    scale = torch.rand(100) + 0.5
    weight = ao.InputScaledTensor(base, scale, shape=base.shape, dtype=base.dtype, scheme=base.scheme)
    plain, model = nn.Linear(100, 17), nn.Sequential(linear)
    plain.weight, plain.bias = nn.Parameter(base, requires_grad=False), linear.bias
    linear.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(5, 100)
    out = model(x)
    assert torch.equal(out, plain(x * scale))
    assert torch.equal(copy.deepcopy(model)(x), out)
    torch.testing.assert_close(weight[3:9].dequantize(), weight.dequantize()[3:9])
    assert model.to("cpu")(x).equal(out)
    moved = copy.deepcopy(model).to(torch.bfloat16)[0].weight
    assert moved.dtype == moved.base.dtype == torch.bfloat16
    ao.save(model, tmp_path / "saved")
    again = ao.load(tmp_path / "saved", model=lambda: nn.Sequential(nn.Linear(100, 17)))
    assert type(again[0].weight.base) is type(base)
    assert torch.equal(again(x), out)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), out)


BAD = {
    "float64": (lambda w: w.double(), "float64"),
    "integers": (lambda w: (w * 10).to(torch.int8), "int8"),
    "complex": (lambda w: w.to(torch.complex64), "complex64"),
    "meta": (lambda w: w.to("meta"), "meta device"),
    "nan": (lambda w: w.index_fill(1, torch.tensor(3), float("nan")), "NaN"),
}


@pytest.mark.parametrize("bad", list(BAD))
@pytest.mark.parametrize("scheme", EVERY)
def test_a_bad_weight_changes_nothing(scheme, bad):
    """The layers before it stay as they were, too."""
    change, word = BAD[bad]
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = nn.Parameter(change(model[1].weight.detach()), requires_grad=False)
    before = [layer.weight for layer in model]
    plan = ao.Plan({"0": ao.Choice(scheme), "1": ao.Choice(scheme)})
    with pytest.raises((ao.RejectedError, ao.PlanError), match=rf"(?s)'1'.*{word}"):
        ao.apply_(model, plan)
    assert all(layer.weight is weight for layer, weight in zip(model, before, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("scheme", EVERY)
def test_an_absent_device(scheme):
    """Torch's own error; the weight stays where it is."""
    module = nn.Linear(64, 64)
    ao.quantize_(module, scheme)
    weight = module.weight
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        module.to("cuda")
    assert module.weight is weight and module.weight.device.type == "cpu"
