"""The nearest of a few levels, against every distance in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from number_cases import DEVICES, DTYPES, make
from torch.utils._python_dispatch import TorchDispatchMode

from ao_core.numerics import codebook

LEVELS = {
    "ternary": [-1.0, 0.0, 1.0],
    "one": [0.25],
    "uneven": [-1.0, -0.6962, -0.5251, -0.0911, 0.0, 0.0796, 0.1609, 0.4407, 1.0],
    "huge": [-3e38, -1e-30, 3e38],
}


def nearest(values, levels):
    """Every distance in float64; argmin takes the first, the lower index."""
    distances = np.abs(values.double().numpy()[..., None] - levels.double().numpy())
    return torch.from_numpy(distances.argmin(-1)).to(torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*LEVELS, "random"])
@pytest.mark.parametrize("shape", [(1,), (17, 63), (2, 3, 100)])
def test_encode_finds_the_nearest(shape, name, dtype, device):
    levels = make(256, seed=1).sort().values if name == "random" else torch.tensor(LEVELS[name])
    values = make(*shape, dtype=dtype)
    got = codebook.encode(values.to(device), levels.to(device))
    assert torch.equal(got.cpu(), nearest(values, levels))
    assert torch.equal(codebook.decode(got, levels.to(device)).cpu(), levels[got.cpu().long()])


@pytest.mark.parametrize("name", ["uneven", "random"])
def test_encode_is_right_to_the_last_bit_around_midpoints(name):
    levels = make(256, seed=1).sort().values if name == "random" else torch.tensor(LEVELS[name])
    middle = ((levels[1:].double() + levels[:-1].double()) / 2).float()
    up, down = (torch.nextafter(middle, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    for values in (middle, up, down, levels):
        assert torch.equal(codebook.encode(values, levels), nearest(values, levels))


def test_a_tie_takes_the_lower_index():
    levels = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    values = torch.tensor([-9.0, -0.5, 0.5, 2.0, 9.0, torch.inf, -torch.inf])
    assert codebook.encode(values, levels).tolist() == [0, 0, 1, 2, 3, 3, 0]


def test_encode_takes_empty_and_strided_values():
    levels = torch.tensor(LEVELS["ternary"])
    assert codebook.encode(torch.empty(0, 5), levels).shape == (0, 5)
    values = make(6, 10).t()[::2]
    assert torch.equal(codebook.encode(values, levels), nearest(values, levels))


def test_encode_makes_nothing_larger_than_its_values():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    with Largest() as largest:
        codebook.encode(make(1000), torch.tensor(LEVELS["uneven"]))
    assert largest.numel == 1000


def test_bad_arguments_of_codebook():
    values = make(3)
    with pytest.raises(ValueError, match="ascend"):
        codebook.encode(values, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="ascend"):
        codebook.encode(values, torch.tensor([0.0, 0.0, 1.0]))
    for shape in ((0,), (257,), (2, 2)):
        with pytest.raises(ValueError, match="1 to 256 levels"):
            codebook.encode(values, torch.zeros(shape))
    with pytest.raises(TypeError, match="float values"):
        codebook.encode(values.long(), torch.tensor([0.0, 1.0]))
    with pytest.raises(TypeError, match="integer codes"):
        codebook.decode(values, torch.tensor([0.0, 1.0]))
    with pytest.raises((IndexError, RuntimeError), match="range"):
        codebook.decode(torch.tensor([2]), torch.tensor([0.0, 1.0]))
