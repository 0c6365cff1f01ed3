"""1×1 convolutions as linears: the same numbers for every stride, padding and layout."""

import copy

import pytest
import torch
from torch import nn

import ao_core as ao
from ao_quant.pointwise import PointwiseConv2d, swap_conv2d_1x1_to_linear


@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize(
    "padding", [0, 1, (2, 1), "same", "valid", ("reflect", 1), ("circular", (1, 2)), ("replicate", 2)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_numbers(stride, padding, bias):
    mode, padding = (
        padding if isinstance(padding, tuple) and isinstance(padding[0], str) else ("zeros", padding)
    )
    if padding == "same" and stride != 1:
        pytest.skip("torch has no strided 'same'")
    conv = nn.Conv2d(
        17, 5, 1, stride=stride, padding=padding, dilation=3, padding_mode=mode, bias=bias
    ).double()
    model = nn.Sequential(conv)
    x = torch.randn(2, 17, 9, 7, dtype=torch.float64)
    expected = model(x)
    assert swap_conv2d_1x1_to_linear(model).swapped == ["0"]
    assert isinstance(model[0], PointwiseConv2d)
    for given, wanted in (
        (x, expected), (x[0], expected[0]), (x.to(memory_format=torch.channels_last), expected)
    ):  # fmt: skip
        torch.testing.assert_close(model(given), wanted)


def test_what_is_left_alone():
    class Special(nn.Conv2d):
        pass

    model = nn.ModuleDict({
        "wide": nn.Conv2d(4, 4, 3), "deep": nn.Conv2d(4, 4, 1, groups=4), "own": Special(4, 4, 1),
        "plain": nn.Conv2d(4, 4, 1), "kept": nn.Conv2d(4, 4, 1),
    })  # fmt: skip
    report = swap_conv2d_1x1_to_linear(model, lambda module, name: name != "kept")
    assert report.swapped == ["plain"]
    assert report.refused == {
        "deep": "it has 4 groups, and a linear mixes all channels",
        "own": "it is a Special, whose forward may do more than a Conv2d's",
    }
    assert type(model["kept"]) is nn.Conv2d


def test_a_module_used_twice_stays_one():
    shared = nn.Conv2d(4, 4, 1)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert swap_conv2d_1x1_to_linear(model).swapped == ["a", "b.0"]
    assert model["a"] is model["b"][0]


def test_a_convolution_alone_says_what_to_do():
    with pytest.raises(ao.AoError, match=r"itself a Conv2d.*nn.Sequential"):
        swap_conv2d_1x1_to_linear(nn.Conv2d(3, 3, 1))


def test_training_and_quantizing():
    model = nn.Sequential(nn.Conv2d(32, 48, 1, stride=2), nn.ReLU(), nn.Conv2d(48, 8, 1)).eval()
    x = torch.randn(2, 32, 6, 6)
    expected = model(x)
    swapped = copy.deepcopy(model)
    swap_conv2d_1x1_to_linear(swapped)
    swapped(x).sum().backward()
    assert swapped[0].weight.grad.shape == (48, 32)
    report = ao.quantize_(swapped, "int8-dynamic")
    assert set(report.converted) == {"0", "2"}
    assert ao.sqnr(expected, swapped(x)) > 30
