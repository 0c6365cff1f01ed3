"""SmoothQuant: equation 4, where the factors go, and that it helps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ao_core as ao
from ao_quant.smoothquant import GRID, SmoothQuant, column_absmax, output_error, smoothing_factors

SCHEME = "int8-dynamic"
FOLDED, EXPLICIT = "folded into ", "explicit input scale"


def test_equation_4():
    """Against float64; dead channels get 1, and nothing overflows."""
    x = torch.tensor([3.0, 0.5, 0.0, 2.0, 1e-30, 1e30, 1e-38], dtype=torch.float32)
    w = torch.tensor([0.1, 0.2, 0.3, 0.0, 1e30, 1e-30, 1e38], dtype=torch.float32)
    for alpha in (0.0, 0.25, 0.5, 1.0):
        s = smoothing_factors(x, w, alpha)
        assert s.dtype == torch.float32 and bool(torch.isfinite(s).all()) and bool((s > 0).all())
        assert s[2] == s[3] == 1
        expected = x.double() ** alpha / w.double() ** (1 - alpha)
        for index in (0, 1, 4, 5):
            if 1e-37 < float(expected[index]) < 1e38:
                assert float(s[index]) == pytest.approx(float(expected[index]), rel=1e-5)


def test_the_maxima_of_layers_that_share_an_input_are_joined():
    q, k = torch.randn(7, 5), torch.randn(3, 5)
    assert torch.equal(column_absmax([q, k]), torch.cat([q, k]).abs().amax(0))


def test_the_error_is_that_of_the_output():
    scheme, x, w = ao.parse_scheme(SCHEME), torch.randn(50, 17), torch.randn(9, 17)
    s = torch.linspace(0.5, 2, 17)
    expected = x.double() @ w.double().T
    found = torch.nn.functional.linear(x / s, scheme.quantize(w * s)).double()
    relative = (found - expected).norm(dim=1).mean() / expected.norm(dim=1).mean()
    assert output_error(x, [w], [scheme], s) == pytest.approx(float(relative), rel=1e-4)
    both = output_error(x, [w, w], [scheme, scheme], s)
    assert both == pytest.approx(output_error(x, [w], [scheme], s), rel=1e-6)


class RMSNorm(nn.Module):
    """``weight`` times, or with ``offset`` ``1 + weight`` times, the normalized input."""

    def __init__(self, size, offset=False):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(size) + 0.5 - float(offset)), float(offset)

    def forward(self, x):
        return (self.weight + self.offset) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    """Two linears on a norm, multiplied, and one on the product: SwiGLU, or with ``relu`` without gate."""

    def __init__(self, norm=RMSNorm, activation=nn.functional.silu, bias=False, twice=False):
        super().__init__()
        self.norm = norm(17)
        self.gate, self.up = nn.Linear(17, 23, bias=bias), nn.Linear(17, 23, bias=bias)
        self.down = nn.Linear(23, 17, bias=bias)
        self.activation, self.twice = activation, twice

    def forward(self, x):
        y = self.norm(x)
        out = self.down(self.activation(self.gate(y)) * self.up(y))
        return (y if self.twice else x) + out


def model_of(**options):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(**options) for _ in range(2)]).eval()


def outlying(rows=64, columns=17):
    """Inputs with two channels fifty times as large as the others."""
    x = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(3))
    x[..., [3, 11]] *= 50
    return [x[:1], x[1:]]


def smoothed(model, data, *, exclude=None, **options):
    """The report, and for each layer where its factors went."""
    report = ao.compress_(model, SmoothQuant(**options), data, scheme=SCHEME, exclude=exclude)
    return report, {name: note.get("smoothquant", "") for name, note in report.notes.items()}


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm, RMSNorm, lambda size: RMSNorm(size, offset=True)],
    ids=["LayerNorm", "RMSNorm", "1 + weight"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fold_into_a_norm(norm, dtype):
    """The norm gives the smoothed input, and the model computes what it did."""
    model = model_of(norm=norm).to(dtype)
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.bias.data += torch.randn(17) * 0.1
    data = [batch.to(dtype) for batch in outlying()]
    before, reference = copy.deepcopy(model), model(data[0]).detach()
    report, where = smoothed(model, data, alpha=0.5, exclude="*down")  # whose factors would change up
    assert where["0.gate"] == where["0.up"] == f"{FOLDED}0.norm"
    with torch.no_grad():
        x = torch.cat([before[0].norm(batch).reshape(-1, 17) for batch in data]).double()
        w = torch.cat([before[0].gate.weight, before[0].up.weight]).abs().amax(0).double()
        s = x.abs().amax(0).sqrt() / w.sqrt()
        found, expected = model[0].norm(data[0]) * s, before[0].norm(data[0]).double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert ao.sqnr(reference, model(data[0])) > 25
    assert report.notes["0.up"]["alpha"] == 0.5


def test_weights_are_scaled_before_they_are_quantized():
    model = model_of()
    before, data = copy.deepcopy(model), outlying()
    smoothed(model, data, alpha=0.5, exclude="*down")
    with torch.no_grad():
        x = torch.cat([before[0].norm(batch).reshape(-1, 17) for batch in data])
    s = smoothing_factors(x.abs().amax(0), column_absmax([before[0].gate.weight, before[0].up.weight]), 0.5)
    expected = ao.parse_scheme(SCHEME).quantize(before[0].gate.weight.detach() * s)
    assert torch.equal(model[0].gate.weight.codes, expected.codes)
    torch.testing.assert_close(model[0].norm.weight, before[0].norm.weight / s)


def test_factors_know_what_later_ones_did_to_the_weights():
    """Down's factors divide up's rows; only then are the maxima of up's columns taken."""
    model = model_of()
    before, data = copy.deepcopy(model), outlying()
    smoothed(model, data, alpha=0.5)
    gate, up, down = before[0].gate.weight, before[0].up.weight, before[0].down.weight
    with torch.no_grad():
        x = torch.cat([before[0].norm(batch).reshape(-1, 17) for batch in data])
        hidden = nn.functional.silu(x @ gate.T) * (x @ up.T)
        s_down = smoothing_factors(hidden.abs().amax(0), column_absmax([down]), 0.5)
        s = smoothing_factors(x.abs().amax(0), column_absmax([gate, up / s_down[:, None]]), 0.5)
        torch.testing.assert_close(model[0].norm.weight, before[0].norm.weight / s)


@pytest.mark.parametrize("bias", [False, True])
def test_a_fold_through_a_product(bias):
    """Up's rows take down's factors; gate's can't, for silu is not linear."""
    model = model_of(bias=bias)
    _, where = smoothed(model, outlying())
    assert {where["0.down"], where["1.down"]} == {f"{FOLDED}0.up", f"{FOLDED}1.up"}


def test_a_fold_through_relu():
    """``relu(x / s) = relu(x) / s``, found by measuring."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(17), nn.Linear(17, 23), nn.Linear(23, 17)

        def forward(self, x):
            return x + self.down(self.activation(self.up(self.norm(x))))

        activation = staticmethod(torch.relu)

    class Smooth(Plain):
        activation = staticmethod(torch.tanh)

    for kind, expected in ((Plain, f"{FOLDED}0.up"), (Smooth, EXPLICIT)):
        torch.manual_seed(0)
        model = nn.Sequential(kind(), kind()).eval()
        data, reference = outlying(), model(outlying()[0]).detach()
        _, where = smoothed(model, data, alpha=0.5)
        assert where["0.down"] == expected
        assert isinstance(model[0].down.weight, ao.InputScaledTensor) == (expected == EXPLICIT)
        assert ao.sqnr(reference, model(data[0])) > 30


def test_a_norm_that_others_read_keeps_its_weight():
    """Its output goes past the linears too: the factors become explicit."""
    model = model_of(twice=True)
    before, data, reference = copy.deepcopy(model), outlying(), model(outlying()[0]).detach()
    _, where = smoothed(model, data, alpha=0.5)
    assert where["0.up"] == where["1.gate"] == EXPLICIT
    assert torch.equal(model[0].norm.weight, before[0].norm.weight)
    assert torch.equal(model[0].up.weight.input_scale, model[0].gate.weight.input_scale)
    assert ao.sqnr(reference, model(data[0])) > 30


def test_a_linear_outside_the_plan_reads_the_norm_too():
    """It stays in float, and its columns are scaled with the others'."""
    model = model_of()
    before, data = copy.deepcopy(model), outlying()
    report = ao.compress_(model, "smoothquant:alpha=0.5", data, scheme=SCHEME, exclude="*gate")
    assert report.notes["0.up"]["smoothquant"] == f"{FOLDED}0.norm"
    gate = model[0].gate.weight
    assert type(gate) is nn.Parameter
    with torch.no_grad():
        torch.testing.assert_close(
            model[0].gate(model[0].norm(data[0])), before[0].gate(before[0].norm(data[0]))
        )


def test_a_module_that_two_blocks_share_is_left_alone():
    model = model_of()
    model[1].norm = model[0].norm
    before = model[0].norm.weight
    _, where = smoothed(model, outlying(), alpha=0.5)
    assert model[0].norm.weight is before
    assert where["0.up"] == where["1.up"] == EXPLICIT


def test_what_is_quantized_already_can_t_be_scaled():
    """Another algorithm took gate: up's factors become explicit."""

    class First(ao.BlockAlgorithm):
        name = "first"

        def visit(self, stage):
            name = f"{stage.name}.gate"
            stage.replace(name, stage.schemes[name].quantize(stage.weight(name)))

    model, data = model_of(), outlying()
    reference = model(data[0]).detach()
    report = ao.compress_(model, [First(), SmoothQuant(alpha=0.5)], data, scheme=SCHEME)
    assert report.notes["0.up"]["smoothquant"] == EXPLICIT
    assert ao.sqnr(reference, model(data[0])) > 20


def test_it_helps():
    """Inputs with outlying channels: less error than without; by its own measure the search beats 0.5."""
    errors, reports = {}, {}
    for name, options in (("none", None), ("half", {"alpha": 0.5}), ("auto", {"alpha": "auto"})):
        model, data = model_of(), outlying()
        for block in model:
            block.norm.weight.data[5] *= 40
        reference = model(data[0]).detach()
        if options is None:
            ao.quantize_(model, SCHEME)
        else:
            reports[name], _ = smoothed(model, data, **options)
        errors[name] = ao.sqnr(reference, model(data[0]))
    assert errors["half"] > errors["none"] + 6
    assert errors["auto"] > errors["none"] + 6
    for layer in ("0.up", "0.down"):
        assert reports["auto"].notes[layer]["error"] <= reports["half"].notes[layer]["error"]


def test_the_search_takes_one_exponent_with_the_least_power_of_all_errors():
    """Two groups that would each take another one; what each exponent costs, asked of it one by one."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 17)).eval()
    model[0].weight.data[:, 7] *= 20
    data = [torch.randn(2, 40, 64) * torch.logspace(-2, 2, 64)]
    powers, own = {}, {}
    for alpha in GRID:
        report, _ = smoothed(copy.deepcopy(model), data, alpha=alpha)
        facts = [report.notes[name] for name in ("0", "2")]
        own[alpha] = [min(each["error"], each["error_unsmoothed"]) for each in facts]
        powers[alpha] = sum(error**2 for error in own[alpha])
    report, _ = smoothed(model, data, alpha="auto")
    best = min(powers, key=powers.get)
    assert {each["alpha"] for each in report.notes.values()} == {best}
    alone = [min(own, key=lambda alpha: own[alpha][group]) for group in range(2)]
    assert alone[0] != alone[1]


def test_smoothing_that_does_not_help_is_not_done():
    """Channels are alike: ``auto`` leaves them, an exponent that is asked for is applied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    model[0].weight.data = torch.randint(-127, 128, (64, 64)).float()
    data = [torch.randint(-127, 128, (1, 40, 64)).float()]
    before = copy.deepcopy(model)
    report, where = smoothed(model, data, alpha="auto")
    assert where["0"] == "smoothing measured no better"
    assert type(model[0].weight).__name__ == "Int8DynamicTensor"
    assert report.notes["0"]["error"] < 0.01
    _, where = smoothed(before, data, alpha=0.9)
    assert where["0"] == EXPLICIT


def test_dead_channels_and_no_tokens():
    class Unused(Block):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(17, 17)

    torch.manual_seed(0)
    model, data = nn.Sequential(Unused(), Unused()).eval(), outlying()
    for block in model:
        block.norm.weight.data[4] = 0
        block.up.weight.data[:, 5] = block.gate.weight.data[:, 5] = 0
    reference = model(data[0]).detach()
    report, where = smoothed(model, data, alpha=0.5)
    assert where["0.spare"] == "it saw no token, and was not smoothed"
    assert report.converted["0.spare"] == SCHEME
    assert model[0].norm.weight[4] == 0
    assert ao.sqnr(reference, model(data[0])) > 30


def llama(**options):
    transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=36,
        intermediate_size=63,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **options,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data *= torch.exp(torch.randn(parameter.shape)) if "norm" in name else 3
    return model


@pytest.mark.parametrize(
    ("heads", "o_proj"), [(2, EXPLICIT), (6, f"{FOLDED}model.layers.0.self_attn.v_proj")]
)
def test_a_language_model(tmp_path, heads, o_proj):
    """Folds of a Llama: with grouped heads v's rows can't take o's factors. Saving keeps every bit."""
    model = llama(num_key_value_heads=heads)
    data = [torch.randint(0, 99, (2, 17)), torch.randint(0, 99, (1, 33))]
    plain, reference = copy.deepcopy(model), model(data[0]).logits.detach()
    _, where = smoothed(model, data, alpha=0.5)
    layer = "model.layers.0"
    assert {where[f"{layer}.self_attn.{n}_proj"] for n in "qkv"} == {f"{FOLDED}{layer}.input_layernorm"}
    assert where[f"{layer}.self_attn.o_proj"] == o_proj
    assert {where[f"{layer}.mlp.{n}_proj"] for n in ("gate", "up")} == {
        f"{FOLDED}{layer}.post_attention_layernorm"
    }
    assert where[f"{layer}.mlp.down_proj"] == f"{FOLDED}{layer}.mlp.up_proj"
    assert where["lm_head"] == f"{FOLDED}model.norm"
    ao.quantize_(plain, SCHEME)
    error = ao.sqnr(reference, model(data[0]).logits)
    assert error > 20 and error > ao.sqnr(reference, plain(data[0]).logits)

    ao.save(model, tmp_path / "saved")
    again = ao.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(data[0]).logits, model(data[0]).logits)


def test_experts_and_an_encoder(tmp_path):
    """A stack of experts is quantized unsmoothed, with the reason; a BERT has no norm to fold into."""
    transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = transformers.MixtralConfig(
        vocab_size=99, num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64, **sizes
    )
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    data = [torch.randint(0, 99, (2, 17))]
    reference = model(data[0]).logits.detach()
    report, where = smoothed(model, data, alpha=0.5)
    assert where["model.layers.0.mlp.experts.down_proj"].startswith("the experts of a stack share")
    assert report.converted["model.layers.0.mlp.experts.down_proj"] == SCHEME
    assert ao.sqnr(reference, model(data[0]).logits) > 20

    model = transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes)).eval()
    reference = model(data[0]).last_hidden_state.detach()
    _, where = smoothed(model, data, alpha=0.5)
    assert where["encoder.layer.0.attention.self.query"] == EXPLICIT
    assert where["encoder.layer.0.intermediate.dense"] == EXPLICIT
    assert ao.sqnr(reference, model(data[0]).last_hidden_state) > 20
    ao.save(model, tmp_path / "saved")
    again = ao.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(data[0]).last_hidden_state, model(data[0]).last_hidden_state)


@pytest.mark.parametrize(
    ("text", "scheme", "words"),
    [
        ("smoothquant", "int8-weight-only", "int8-weight-only leaves activations in float"),
        ("smoothquant", None, "it needs a scheme that quantizes activations"),
        ("smoothquant:alpha=2", SCHEME, "alpha from 0 to 1, or auto; found 2"),
        ("smoothquant:alpha=best", SCHEME, "found 'best'"),
        ("smoothquant:rows=0", SCHEME, "rows 1 or more, found 0"),
        ("smoothquant:beta=1", SCHEME, "has no option 'beta'; it has alpha, rows"),
    ],
)
def test_what_is_refused(text, scheme, words):
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ao.OptionError, match=words):
        ao.compress_(model, text, outlying(), scheme=scheme)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_of_a_weight_only_scheme_are_passed_by():
    rules = [ao.Rule("*.down", "int8-weight-only"), ao.Rule("*", SCHEME)]
    model = model_of()
    report = ao.compress_(model, SmoothQuant(), outlying(), scheme=rules)
    assert "leaves activations in float" in report.notes["0.down"]["smoothquant"]
    assert report.notes["0.up"]["smoothquant"].startswith(FOLDED)
    assert report.converted["0.down"] == "int8-weight-only"


def test_an_input_scale_moves_with_its_weight():
    """To another device, the weight that it wraps included."""
    model = model_of(twice=True)
    smoothed(model, outlying(), alpha=0.5)
    moved = model.to("meta")[0].up.weight
    assert isinstance(moved, ao.InputScaledTensor)
    assert {part.device.type for part in (moved.input_scale, moved.base, moved.base.codes)} == {"meta"}
