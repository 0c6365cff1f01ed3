"""Pruning on the block walk: levels, rules, what comes after in the same walk, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import Block, model_of
from torch import nn

import ao_core as ao
from ao_core.metrics import sparsity
from ao_sparsity.algorithm import Wanda
from ao_sparsity.masks import violations

PRUNERS = ["magnitude", "wanda", "sparsegpt"]


def data(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8 + torch.eye(64) / 2
    return [torch.randn(4, 60, 64, generator=generator) @ mix for _ in range(3)]


def weights(model):
    return {name: p for name, p in model.named_parameters() if p.ndim == 2}


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("options", ["sparsity=0.5", "sparsity=0.3,per=layer", "pattern=2:4", "pattern=1:4"])
def test_levels_are_met_and_not_exceeded_a_second_time(name, options):
    model = model_of()
    report = ao.compress_(model, f"{name}:{options}", data())
    level = {"sparsity=0.3,per=layer": 0.3, "pattern=1:4": 0.75}.get(options, 0.5)
    for fqn, weight in weights(model).items():
        share = float((weight == 0).float().mean())
        assert level - 0.02 < share <= level + 1e-6, fqn
        assert report.notes[fqn.removesuffix(".weight")]["sparsity"] == pytest.approx(share)
        if "pattern" in options:
            assert violations(weight, int(options[8]), 4) == 0
    once = copy.deepcopy(model.state_dict())
    ao.compress_(model, f"{name}:{options}", data(7))
    assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("sequential", [True, False])
def test_the_inputs_are_those_of_pruned_blocks_or_of_the_float_model(sequential):
    """By hand: the norm of what each linear sees, the blocks before it pruned or not, its own not."""
    model, by_hand = model_of(), model_of()
    ao.compress_(model, f"wanda:sequential={sequential}", data())
    stream = [x.clone() for x in data()]
    with torch.no_grad():
        for block in by_hand:
            seen: dict[str, torch.Tensor] = {}
            parts = [name for name, part in block.named_modules() if isinstance(part, nn.Linear)]
            handles = [
                block.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, name=name, seen=seen: seen.__setitem__(
                        name, seen.get(name, 0) + args[0].double().square().sum((0, 1))
                    )
                )
                for name in parts
            ]
            for x in stream:
                block(x)
            for handle in handles:
                handle.remove()
            given = [block(x) for x in stream]
            for name in parts:
                weight = block.get_submodule(name).weight
                score = weight.double().abs() * seen[name].sqrt()
                least = score.argsort(dim=-1)[:, : weight.shape[1] // 2]
                weight.data.scatter_(1, least, 0)
            stream = [block(x) for x in stream] if sequential else given
    same = [
        torch.equal(a == 0, b == 0) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True)
    ]
    assert all(same)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_what_looks_at_inputs_errs_less():
    unseen, dense = data(9)[0], model_of()
    found = {}
    for name in PRUNERS:
        model = model_of()
        ao.compress_(model, name, data())
        found[name] = ao.sqnr(dense(unseen), model(unseen))
    assert found["magnitude"] < found["wanda"] < found["sparsegpt"]


def test_rules_give_layers_their_own_levels():
    for rules in ("(*.down=0.25 *.up=2:4 0.*=0)", {"*.down": 0.25, "*.up": "2:4", "0.*": 0}):
        model = model_of()
        text = f"wanda:sparsity=0.75,rules={rules}" if isinstance(rules, str) else Wanda(0.75, rules=rules)
        ao.compress_(model, text, data())
        shares = {name: round(float((w == 0).float().mean()), 2) for name, w in weights(model).items()}
        assert shares["0.gate.weight"] == 0 and shares["1.gate.weight"] == 0.75
        assert shares["2.down.weight"] == shares["0.down.weight"] == 0.25
        assert violations(model[1].up.weight, 2, 4) == 0
    with pytest.raises(ao.PlanError, match=r"rule '\*\.nothing' of wanda matches none of the 9 layers"):
        ao.compress_(model_of(), "wanda:rules=(*.nothing=0.5)", data())


@pytest.mark.parametrize("scheme", ["int4-weight-only", "int4-weight-only:qparams=hqq,group_size=32", "nf4",
                                    "int8-dynamic", "float8-weight-only", "uint4", "ternary",
                                    "int8-dynamic-int4-weight"])  # fmt: skip
@pytest.mark.parametrize("middle", [[], ["gptq"], ["gptq:act_order=True"], ["smoothquant"]])
def test_pruned_weights_stay_zero_in_one_walk(scheme, middle):
    """Through GPTQ, smoothing and rounding, float midpoints too; bytes are those of the scheme."""
    if middle == ["smoothquant"] and "dynamic" not in scheme:
        pytest.skip("smoothing is for schemes that quantize activations")
    pruned, model, dense = model_of(), model_of(), model_of()
    ao.compress_(pruned, "wanda:pattern=2:4", data())
    report = ao.compress_(model, ["wanda:pattern=2:4", *middle], data(), scheme=scheme)
    assert len(report.converted) == 9
    first = model[0].up.weight.dequantize()
    assert not first[pruned[0].up.weight == 0].any()
    assert 0.5 <= sparsity(model) < 0.56
    for weight in weights(model).values():
        assert violations(weight.dequantize(), 2, 4) == 0
    ao.quantize_(dense, scheme)
    extra = sum(ao.stored_bytes(w) for w in weights(model).values())
    plain = sum(ao.stored_bytes(w) for w in weights(dense).values())
    assert plain <= extra <= plain + 9 * 4 * 100  # input scales of smoothing


def test_gptq_makes_up_for_rounding_on_a_pruned_layer():
    unseen, scheme = data(9)[0], "int4-weight-only:group_size=32"
    found = []
    for algorithms in (["wanda:pattern=2:4"], ["wanda:pattern=2:4", "gptq"]):
        model, floats = model_of(), model_of()
        ao.compress_(floats, "wanda:pattern=2:4", data())
        ao.compress_(model, algorithms, data(), scheme=scheme)
        found.append(ao.sqnr(floats(unseen), model(unseen)))
    assert found[1] > found[0]


def test_2_4_through_gptq_into_2_4_int8():
    model = model_of()
    report = ao.compress_(model, ["sparsegpt:pattern=2:4", "gptq"], data(), scheme="semi-sparse-int8-dynamic")
    assert len(report.converted) == 9
    assert all("error" in facts for facts in report.notes.values())
    assert ao.sqnr(model_of()(data(9)[0]), model(data(9)[0])) > 15


def test_a_scheme_that_has_no_zero_is_refused():
    from dataclasses import dataclass

    from ao_quant.int8 import Int8WeightOnly

    @dataclass(frozen=True)
    class Odd(Int8WeightOnly):
        name = "odd"

        def encode(self, weight, qparams):
            return super().encode(weight, qparams) | 1

    model = model_of()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ao.RejectedError, match="pruned weights are not zero any more"):
        ao.compress_(model, "wanda", data(), scheme=Odd())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_that_no_token_reached_is_pruned_by_magnitude_and_says_so(caplog):
    class Spare(Block):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(20, 5)

    torch.manual_seed(0)
    model = nn.Sequential(Spare(), Spare()).eval()
    weight = model[0].spare.weight.detach().clone()
    for name in ("wanda", "sparsegpt"):
        pruned = copy.deepcopy(model)
        report = ao.compress_(pruned, name, data())
        assert "no token reached it" in report.notes["0.spare"]["pruned"]
        assert "layer 0.spare: no token reached it" in caplog.text
        kept = pruned[0].spare.weight != 0
        assert kept.sum() == 50
        for row in range(5 if name == "wanda" else 0):
            assert weight[row].abs()[kept[row]].min() >= weight[row].abs()[~kept[row]].max()


def test_experts_are_pruned_by_what_each_sees():
    class MoeExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 16))

        def forward(self, x):
            return torch.stack([x[index] @ self.weight[index].t() for index in range(3)])

    torch.manual_seed(0)
    model = nn.Sequential(MoeExperts())
    before, x = model[0].weight.detach().clone(), torch.randn(3, 40, 16) * torch.rand(3, 1, 16)
    report = ao.compress_(model, "wanda:pattern=2:4", [x])
    for index in range(3):
        score = before[index].abs() * x[index].norm(dim=0)
        kept = score.view(8, 4, 4).argsort(dim=-1)[..., 2:]
        expected = torch.zeros(8, 4, 4, dtype=torch.bool).scatter_(-1, kept, value=True).view(8, 16)
        assert torch.equal(model[0].weight[index] != 0, expected)
    assert report.notes["0"]["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wanda:sparsity=1.0", "from 0 to below 1"),
        ("wanda:sparsity=-0.5", "from 0 to below 1"),
        ("sparsegpt:pattern=5:4", "1 <= n <= m"),
        ("magnitude:pattern=0.5", "pattern n:m"),
        ("wanda:pattern=2:4,sparsity=0.7", "pattern 2:4 makes 0.5 of the weights zero"),
        ("wanda:per=column", "per row or per layer"),
        ("wanda:squared=2", "squared true or false"),
        ("sparsegpt:sequential=2", "sequential true or false"),
        ("wanda:rules=(*up)", "has no '='"),
        ("wanda:rules=(*up=7:4)", "1 <= n <= m"),
        ("sparsegpt:percdamp=2", "percdamp from 0 to 1"),
        ("sparsegpt:block_size=0", "block_size 1 or more"),
        ("magnitude:squared=True", "no option 'squared'"),
        ("magnitude:sequential=False", "no option 'sequential'"),
    ],
)
def test_options_that_are_refused(text, words):
    with pytest.raises(ao.OptionError, match=words):
        ao.parse_algorithm(text)
