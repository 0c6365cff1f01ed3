"""From rules to a plan to a converted model: what is converted, what is left alone and why."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import ao_core as ao
from ao_core import plugins, registry
from ao_core.plan import plan_of
from ao_core.scheme import SCHEMES

SOURCE = registry.Source("tests", "tests", "1")
pytestmark = pytest.mark.usefixtures("plain_environment")


class WholeTensor(ao.QuantizedTensor):
    data_names = ("codes",)

    def dequantize(self):
        return self.codes.to(self.dtype)


@dataclass(frozen=True)
class Whole(ao.Scheme):
    """Whole numbers as int8: one byte a weight, exact for small whole weights."""

    name: ClassVar[str] = "whole"
    tensor_types = (WholeTensor,)

    largest: int = 100
    block: tuple[int, ...] = (1, 1)

    def rejects(self, weight):
        few = "it has fewer than 4 columns" if weight.shape[-1] < 4 else None
        return super().rejects(weight) or few

    def choose_qparams(self, weight):
        return {}

    def encode(self, weight, qparams):
        return weight.round().clamp(-self.largest, self.largest).to(torch.int8)

    def decode(self, codes, qparams):
        return codes.float()

    def pack(self, codes, qparams, *, dtype):
        return WholeTensor(codes, shape=codes.shape, dtype=dtype)


@dataclass(frozen=True)
class Half(Whole):
    """Another name for the same."""

    name: ClassVar[str] = "half"


@pytest.fixture(autouse=True)
def _schemes():
    plugins.load()
    for kind in (Whole, Half):
        SCHEMES.add(kind.name, kind, SOURCE)
    yield
    plugins.reset()


def whole_weights(model):
    """Parameters of small whole numbers, so that conversion is exact."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randint(-9, 10, parameter.shape, generator=generator))
    return model.eval()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(17, 17), nn.Linear(17, 5, bias=False)


def two_blocks():
    """Names: 0.q_proj, 0.k_proj, 1.q_proj, 1.k_proj, 2 (a linear of 3 columns)."""
    return whole_weights(nn.Sequential(Attention(), Attention(), nn.Linear(3, 7), nn.LayerNorm(7)))


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


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert type(now[name]) is torch.Tensor, f"{name} was converted"
        assert torch.equal(now[name].view(torch.int32), value.view(torch.int32)), name


def bytes_of(model):
    """An independent count: every tensor that the model holds, by identity, inner tensors for quantized."""
    held = {}
    for tensor in (*model.parameters(), *model.buffers()):
        inner = tensor.stored().values() if isinstance(tensor, ao.QuantizedTensor) else [tensor]
        held |= {each.data_ptr(): each.numel() * each.element_size() for each in inner}
    return sum(held.values())


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
    for name in ("absent", "binary", "other"):
        with pytest.raises(ao.PlanError):
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
