"""The NF4 linear: its levels, its two kinds of absmax, and every kernel against the kit."""

from __future__ import annotations

import pytest
import torch

from ao_core.numerics import pack
from ao_core.testing import parametrize_kernel_checks
from ao_quant.nf4_ops import NF4_LEVELS, block_absmax, dequantize_nf4, linear_reference, nf4_levels


@parametrize_kernel_checks("nf4_linear")
def test_kernel(check):
    check()


def test_levels_are_the_quantiles_of_qlora():
    """Rebuilt from the definition: quantiles of N(0, 1) at evenly spaced probabilities, zero kept."""
    last = 0.9677083  # the mean of the outermost probabilities, 1 - (1/32 + 1/30) / 2
    normal = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))
    above = normal.icdf(torch.linspace(last, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(last, 0.5, 8)[:-1])
    levels = torch.cat((above, torch.zeros(1), below)).sort().values
    levels /= levels.max()
    torch.testing.assert_close(torch.tensor(NF4_LEVELS), levels, rtol=0, atol=2e-6)
    assert torch.equal(torch.tensor(NF4_LEVELS).double(), torch.tensor(NF4_LEVELS, dtype=torch.float64))


def test_levels_equal_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(nf4_levels(torch.empty(0)), theirs)


def test_absmax_is_the_fourth_power_of_a_grid():
    absmax = torch.tensor([[0, 255, 10, 20, 30]], dtype=torch.uint8)
    offset, step = torch.tensor([[0.5, 0.1]]), torch.tensor([[0.01, 0.002]])
    found = block_absmax(absmax, offset, step, scaler_block_size=3)
    roots = [0.5, 0.5 + 255 * 0.01, 0.5 + 0.1, 0.1 + 20 * 0.002, 0.1 + 30 * 0.002]
    torch.testing.assert_close(found, torch.tensor([roots]) ** 4)


def test_absmax_of_floats_is_kept_and_half_a_grid_refused():
    absmax = torch.rand(2, 3)
    assert torch.equal(block_absmax(absmax, None, None, scaler_block_size=256), absmax)
    with pytest.raises(ValueError, match="only one of them was given"):
        block_absmax(absmax, torch.ones(2, 1), None, scaler_block_size=256)


def test_dequantize_keeps_leading_dimensions():
    codes = torch.randint(0, 16, (2, 3, 5, 7), dtype=torch.uint8)
    absmax = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    offset, step = torch.rand(2, 3, 5, 2), torch.rand(2, 3, 5, 2) / 255
    packed = pack.pack(codes, bits=4)
    whole = dequantize_nf4(
        packed, absmax, offset, step, columns=7, block_size=2, scaler_block_size=2, dtype=torch.float16
    )
    assert whole.shape == codes.shape
    assert whole.dtype == torch.float16
    scale = (offset.repeat_interleave(2, -1) + absmax * step.repeat_interleave(2, -1)) ** 4
    levels = torch.tensor(NF4_LEVELS)[codes.long()]
    expected = levels.double() * scale.double().repeat_interleave(2, -1)[..., :7]
    torch.testing.assert_close(whole.double(), expected, rtol=1e-3, atol=1e-6)


def test_reference_is_the_float64_product():
    x = torch.randn(5, 100)
    codes = torch.randint(0, 16, (17, 100), dtype=torch.uint8)
    absmax, bias = torch.rand(17, 4), torch.randn(17)
    weight = torch.tensor(NF4_LEVELS).double()[codes.long()]
    weight *= absmax.double().repeat_interleave(32, 1)[:, :100]
    found = linear_reference(x, pack.pack(codes, bits=4), absmax, None, None, bias, 32, 256)
    expected = x.double() @ weight.t() + bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_decoding_can_be_traced():
    """Levels made while tracing belong to the trace: none is kept for later."""
    packed = torch.randint(0, 256, (4, 8), dtype=torch.uint8)

    def decode(packed):
        options = {"columns": 16, "block_size": 16, "scaler_block_size": 1, "dtype": torch.float32}
        return dequantize_nf4(packed, torch.ones(4, 1), None, None, **options)

    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(packed), decode(packed))
    with torch._subclasses.FakeTensorMode() as mode:
        assert decode_shape(mode, packed) == (4, 16)
    assert torch.equal(decode(packed), compiled(packed))


def decode_shape(mode, packed):
    fake = mode.from_tensor(packed)
    absmax = torch.ones(4, 1)
    found = dequantize_nf4(
        fake, absmax, None, None, columns=16, block_size=16, scaler_block_size=1, dtype=torch.float32
    )
    return tuple(found.shape)
