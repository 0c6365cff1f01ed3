"""SmoothQuant: equation 4, that it helps, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from smoothed_models import EXPLICIT, FOLDED, SCHEME, Block, model_of, outlying, smoothed
from torch import nn

import ao_core as ao
from ao_quant.smoothquant import GRID, SmoothQuant, column_absmax, output_error, smoothing_factors


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
