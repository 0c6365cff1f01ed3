"""Where the factors of SmoothQuant go: into norms and linears where that is exact, else beside the weight."""

from __future__ import annotations

import copy

import pytest
import torch
from smoothed_models import EXPLICIT, FOLDED, SCHEME, RMSNorm, model_of, outlying, smoothed
from torch import nn

import ao_core as ao
from ao_quant.smoothquant import SmoothQuant, column_absmax, smoothing_factors


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
