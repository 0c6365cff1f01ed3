"""GPTQ's column loop against the inverse Hessian of the paper, and the algorithm on models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import Block, data, gaussian, hessian_of, inputs, model_of
from torch import nn

import ao_core as ao
from ao_core.calibrate import Hessian, PairedHessian
from ao_core.numerics.hessian import inverse_factor, output_error
from ao_gptq.algorithm import Gptq
from ao_gptq.factor import Factor
from ao_gptq.gptq import gptq as loop
from ao_gptq.layers import _aim, _shared
from ao_gptq.ranges import choose, scales

SCHEMES = [
    "int4-weight-only:group_size=32",
    "int4-weight-only:group_size=64,zero_point=integer",
    "int4-weight-only:group_size=-1,zero_point=None",
    "int8-weight-only:group_size=10",
    "int8-dynamic-int4-weight",
    "nf4",
    "float8-weight-only",
    "uint4",
    "ternary",
]


def gptq(weight, hessian, scheme, *, percdamp=0.01, act_order=False, **options):
    """The loop on a Hessian."""
    return loop(weight, Factor.of(hessian, percdamp=percdamp, act_order=act_order), scheme, **options)


def by_the_paper(weight, hessian, scheme, percdamp, act_order):
    """Equations 2 and 3 in float64: after each column its row and column leave the inverse."""
    w, h = weight.double().clone(), hessian.double().clone()
    columns = w.shape[1]
    dead = h.diagonal() == 0
    h.diagonal()[dead] = h.diagonal()[~dead].mean()
    size = columns if scheme.group_columns == -1 else min(scheme.group_columns, columns)
    order = h.diagonal().argsort(descending=True, stable=True).tolist() if act_order else range(columns)
    h.diagonal().add_(percdamp * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    qparams = scheme.choose_qparams(weight)
    decoded = torch.zeros_like(w)
    for step, column in enumerate(order):
        group = column // size
        if not act_order and column % size == 0:
            fresh = scheme.choose_qparams(w[:, column : column + size].to(weight.dtype))
            for name, value in fresh.items():
                qparams[name][:, group] = value[:, 0]
        own = {name: value[:, group : group + 1] for name, value in qparams.items()}
        value = w[:, column : column + 1].float()
        decoded[:, column] = scheme.decode(scheme.encode(value, own), own)[:, 0].double()
        error = (w[:, column] - decoded[:, column]) / inverse[column, column]
        later = list(order[step + 1 :])
        w[:, later] -= error[:, None] * inverse[column, later]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return decoded


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(17, 100), (5, 63), (3, 1), (1, 17)])
def test_each_column_is_that_of_the_paper(scheme, act_order, rows, columns):
    """To the last code but for the few that lie between two, where float32 and float64 part."""
    made = ao.parse_scheme(scheme)
    weight, hessian = gaussian(rows, columns), hessian_of(inputs(columns))
    found = gptq(weight, hessian, made, block_size=24, act_order=act_order)
    expected = by_the_paper(weight, hessian, made, 0.01, act_order)
    decoded = made.decode(found.codes, found.qparams).double()
    assert decoded.shape == weight.shape
    assert ao.sqnr(expected, decoded) > 30
    # The largest weight of an int8 row lies between two codes: of three weights it is a third.
    near = 2e-3 if weight.numel() > 10 else 1e-2
    same = (decoded - expected).abs() <= near * expected.abs().amax()
    assert same.double().mean() > 0.97


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_err_less_than_by_rounding(scheme):
    """On inputs it has not seen; and what is stored is what was found."""
    made, weight = ao.parse_scheme(scheme), gaussian(33, 576)
    x, held_back = inputs(576, 4000), inputs(576, 500, seed=1)
    found = gptq(weight, hessian_of(x), made)
    stored = made.assemble(found.codes, found.qparams, dtype=weight.dtype)
    assert stored.scheme == str(made)
    expected = held_back @ weight.t()

    def error(quantized):
        return float((held_back @ quantized.t() - expected).norm() / expected.norm())

    rounded = made.quantize(weight).dequantize()
    assert error(stored.dequantize()) < 0.95 * error(rounded)
    decoded = made.decode(found.codes, found.qparams)
    assert ao.sqnr(decoded, stored.dequantize()) > 40
    direct = (held_back.double() @ (decoded - weight).double().t()).square().sum()
    relative = direct / (held_back.double() @ weight.double().t()).square().sum()
    assert output_error(weight, decoded, hessian_of(held_back)) == pytest.approx(float(relative), rel=1e-3)


@pytest.mark.parametrize("block_size", [1, 7, 64, 128, 1000])
@pytest.mark.parametrize("scheme", [f"int4-weight-only:group_size={size}" for size in (32, 256, -1)])
def test_blocks_change_nothing(scheme, block_size):
    """Lazy updates are only another order of the same sums."""
    made, weight, hessian = ao.parse_scheme(scheme), gaussian(17, 300), hessian_of(inputs(300))
    whole = gptq(weight, hessian, made, block_size=300)
    found = gptq(weight, hessian, made, block_size=block_size)
    assert (found.codes == whole.codes).double().mean() > 0.98


def test_the_factor_is_that_of_the_inverse_and_damping_is_raised_where_it_fails():
    hessian = hessian_of(inputs(63))
    factor, percdamp = inverse_factor(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(63)
    torch.testing.assert_close((factor.t() @ factor).double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-4)
    assert percdamp == 0.01 and torch.equal(factor, factor.triu())
    one = hessian_of(inputs(63, tokens=3))  # of rank 3
    factor, percdamp = inverse_factor(one, 0.0)
    assert percdamp > 0 and torch.isfinite(factor).all()
    with pytest.raises(ao.ModelError, match=r"\(63, 63\) has no Cholesky factor"):
        inverse_factor(-hessian, 0.01)


def test_columns_that_no_input_reaches_are_rounded():
    made, weight, x = ao.parse_scheme("int8-weight-only"), gaussian(17, 100), inputs(100)
    x[:, [0, 50, 99]] = 0
    found = gptq(weight, hessian_of(x), made, static_groups=True)
    rounded = made.encode(weight, made.choose_qparams(weight))
    for column in (0, 50, 99):
        assert torch.equal(found.codes[:, column], rounded[:, column])
    assert not torch.equal(found.codes, rounded)
    nothing = gptq(weight, torch.zeros(100, 100), made)
    assert torch.equal(nothing.codes, rounded)


@pytest.mark.parametrize(
    "options",
    [
        "",
        ",act_order=False",
        ",mse=False,static_groups=True,act_order=False,block_size=7",
        ",true_sequential=True",
        ",asymmetric=1.0",
        ",true_sequential=True,asymmetric=0.5",
    ],
)
def test_a_model(options):
    model, batches, unseen = model_of(), data(), inputs(64, 300, 9)
    expected, rounded = model(unseen).detach(), copy.deepcopy(model)
    ao.quantize_(rounded, "int4-weight-only:group_size=32")
    report = ao.compress_(model, f"gptq:scheme=(int4-weight-only:group_size=32){options}", batches)
    assert len(report.converted) == 9
    for facts in report.notes.values():
        assert facts["gptq"] == "done" and facts["error"] < facts["error_rounded"]
        assert facts["tokens"] == 1200 and facts["percdamp"] == 0.01
    assert type(model[0].up.weight) is type(rounded[0].up.weight)
    assert ao.sqnr(expected, model(unseen)) > ao.sqnr(expected, rounded(unseen)) + 0.5


def test_it_composes_with_smoothquant():
    """Channels 50 times larger than the others: each helps by itself, and both together most."""
    model, batches, unseen = model_of(), data(), inputs(64, 300, 9)
    for block in model:
        block.norm.weight.data[[3, 40]] *= 50
    expected = model(unseen).detach()

    def lost(algorithms):
        tried = copy.deepcopy(model)
        report = ao.compress_(tried, algorithms, batches, scheme="int8-dynamic")
        assert len(report.converted) == 9
        return ao.sqnr(expected, tried(unseen)), report

    smoothed, _ = lost(["smoothquant"])
    rounded, _ = lost(["gptq"])
    both, report = lost(["smoothquant", "gptq"])
    assert both > smoothed + 1 and both > rounded + 1
    for facts in report.notes.values():
        assert facts["gptq"] == "done" and facts["error"] < facts["error_rounded"]
        assert "alpha" in facts or "smoothquant" in facts


def test_a_layer_without_tokens_is_rounded():
    class Spare(Block):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(17, 5)

    torch.manual_seed(0)
    model = nn.Sequential(Spare(), Spare()).eval()
    weight = model[0].spare.weight.detach().clone()
    report = ao.compress_(model, "gptq:scheme=int8-weight-only", data())
    assert "saw no token" in report.notes["0.spare"]["gptq"]
    expected = ao.parse_scheme("int8-weight-only").quantize(weight)
    assert torch.equal(model[0].spare.weight.dequantize(), expected.dequantize())


def test_layers_where_rounding_is_no_worse_keep_it():
    """One column has no other to make up for its error."""
    model = nn.Sequential(nn.Linear(1, 17)).eval()
    expected = ao.parse_scheme("int8-weight-only").quantize(model[0].weight.detach())
    report = ao.compress_(model, "gptq:scheme=int8-weight-only,mse=False", [torch.randn(30, 1)])
    assert "no better than rounding" in report.notes["0"]["gptq"]
    assert torch.equal(model[0].weight.dequantize(), expected.dequantize())


def test_a_pinned_provider_is_kept():
    plan = ao.resolve(model_of(), [ao.Rule("*", "int8-weight-only", provider="reference")])
    model = model_of()
    ao.compress_(model, "gptq", data(), scheme=plan)
    assert model[1].up.weight.provider == "reference"


def test_experts():
    """Each matrix of a stack has its own Hessian; one that saw no token has that of all."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 40, 64) / 8)

        def forward(self, x):
            rows = x.reshape(-1, 64)
            half = len(rows) // 2
            out = [F.linear(rows[:half], self.weight[0]), F.linear(rows[half:], self.weight[2])]
            return torch.cat(out)

    torch.manual_seed(0)
    model = Experts().eval()
    weight = model.weight.detach().clone()
    report = ao.compress_(model, "gptq:scheme=int8-weight-only", data())
    (facts,) = report.notes.values()
    said = [each["gptq"] for each in facts["experts"]]
    assert said[0] == said[2] == "done" and "on the tokens of all experts" in said[1]
    assert isinstance(model.weight, ao.QuantizedTensor)
    assert ao.sqnr(weight, model.weight.dequantize()) > 35


def test_experts_with_too_few_tokens_share_a_hessian():
    """Of three experts one saw 7 tokens: alone they would fit it to these, all tokens do better."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(gaussian(3, 40, 64))

        def forward(self, x):
            cuts = zip(x.split([7, 200, len(x) - 207]), self.weight, strict=True)
            return torch.cat([F.linear(rows, weight) for rows, weight in cuts])

    x, unseen = inputs(64, 600), inputs(64, 500, 9)
    weight = gaussian(3, 40, 64)

    def error(options):
        model = Experts().eval()
        report = ao.compress_(model, f"gptq:scheme=(int4-weight-only:group_size=32){options}", [x])
        wrong = (model.weight.dequantize()[0] - weight[0]) @ unseen.t()
        (facts,) = report.notes.values()
        return float(wrong.norm()), facts["experts"]

    shared, facts = error("")
    assert "on the tokens of all experts" in facts[0]["gptq"] and facts[0]["tokens"] == 7
    assert facts[1]["gptq"] == facts[2]["gptq"] == "done"
    alone, facts = error(",min_tokens=1")
    assert facts[0]["gptq"] == "done"
    assert shared < 0.9 * alone


def test_the_shared_hessian_is_that_of_all_tokens():
    parts, x = [Hessian(63) for _ in range(3)], inputs(63, 300) * torch.linspace(0.1, 9, 300).unsqueeze(1)
    for part, rows in zip(parts, x.split([7, 200, 93]), strict=True):
        part.update(rows)
    found = _shared(parts)
    assert found.tokens == 300
    torch.testing.assert_close(found.value, hessian_of(x), rtol=1e-4, atol=1e-3)
    assert _shared([Hessian(63), Hessian(63)]) is None


def test_the_search_for_parameters_weighs_columns_by_their_inputs():
    """The weighted error is no larger than the scheme's own, smaller in many groups; one scale stays one."""
    made, weight = ao.parse_scheme("int4-weight-only:group_size=32,zero_point=integer"), gaussian(17, 100)
    importance = torch.linspace(0.1, 30, 100).unsqueeze(0)

    def errors(qparams):
        wrong = (made.decode(made.encode(weight, qparams), qparams) - weight).double().square() * importance
        return F.pad(wrong, (0, 28)).view(17, 4, 32).sum(-1)

    own = errors(made.choose_qparams(weight))
    found = errors(choose(weight, importance, made, [10, 7], 32))
    assert bool((found <= own * (1 + 1e-6)).all()) and (found < own).double().mean() > 0.4
    one = ao.parse_scheme("float8-weight-only:granularity=tensor")
    scale = choose(weight, importance, one, [10, 7], 100)["scale"]
    assert len(scale[:10].unique()) == len(scale[10:].unique()) == 1
    with_steps = ao.parse_scheme("ternary")
    assert scales(with_steps) and scales(made) and scales(ao.parse_scheme("nf4"))


def test_layers_with_the_same_input_are_solved_together(monkeypatch):
    """One factorization for gate and up, and the codes that each would get alone."""
    model, alone, factorized = model_of(), model_of(), []
    of = Factor.of
    monkeypatch.setattr(Factor, "of", staticmethod(lambda h, **o: factorized.append(h) or of(h, **o)))
    scheme = "int4-weight-only:group_size=32"
    ao.compress_(model, "gptq", data(), scheme=scheme)
    assert len(factorized) == 6  # of three blocks: gate and up, down
    ao.compress_(alone, "gptq", data(), scheme=scheme, include="0.up")
    assert torch.equal(model[0].up.weight.dequantize(), alone[0].up.weight.dequantize())


def test_asymmetric_calibration_aims_at_the_float_models_outputs():
    """The weight aimed at is the least squares of the float outputs on the inputs seen."""
    x, wanted, weight = inputs(63, 400), inputs(63, 400) + inputs(63, 400, 1) / 4, gaussian(17, 63)
    found = PairedHessian(63)
    found.pair(x, wanted)
    factor = Factor.of(found.value, percdamp=0.0)
    aim = _aim(weight, found, factor, 1.0)
    expected = torch.linalg.lstsq(x.double(), wanted.double() @ weight.double().t()).solution.t()
    torch.testing.assert_close(aim.double(), expected, rtol=2e-2, atol=2e-2)
    half = _aim(weight, found, factor, 0.5)
    torch.testing.assert_close(half, (weight + aim) / 2)
    ordered = _aim(weight, found, Factor.of(found.value, percdamp=0.0, act_order=True), 1.0)
    torch.testing.assert_close(ordered, aim, rtol=1e-2, atol=1e-2)


def test_quantized_activations_are_what_calibration_sees():
    model, batches = nn.Sequential(nn.Linear(64, 17)).eval(), [inputs(64, 300) * 3]
    seen = []
    scheme = ao.parse_scheme("int8-dynamic-int4-weight")

    class Watched(type(scheme)):
        def quantize_input(self, x):
            seen.append(super().quantize_input(x))
            return seen[-1]

    weight = scheme.quantize(torch.eye(64))
    ao.compress_(model, "gptq", batches, scheme=Watched())
    steps, x = seen[0] - batches[0], batches[0]
    assert 0 < steps.abs().max() <= (x.amax(-1) - x.amin(-1)).max() / 255
    # The linear itself multiplies by these: a weight of ones on the diagonal, in its own 4 bits.
    through = F.linear(batches[0], weight)
    torch.testing.assert_close(through, seen[0] @ weight.dequantize().t(), rtol=1e-4, atol=1e-4)
    for name in ("int8-dynamic", "float8-dynamic"):
        made = ao.parse_scheme(name)
        weight = made.quantize(gaussian(17, 64))
        expected = made.quantize_input(x).float() @ weight.dequantize().t()
        torch.testing.assert_close(F.linear(x, weight), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(ao.parse_scheme("nf4").quantize_input(x), x)


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
