"""Codes in bytes, against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from number_cases import DEVICES, SIZES

from ao_core.numerics import pack


def reference_pack(codes, bits):
    """Spread to bits, little end first, and let numpy gather them."""
    spread = (codes[..., None] >> np.arange(bits)) & 1
    spread = spread.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return np.packbits(spread.astype(np.uint8), -1, bitorder="little")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("columns", [*SIZES, 0, 2, 3, 8])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_pack_is_the_little_ended_bit_string(lead, columns, bits, device):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (*lead, columns), generator=generator, dtype=torch.uint8)
    packed = pack.pack(codes.to(device), bits=bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert np.array_equal(packed.cpu().numpy(), reference_pack(codes.numpy(), bits))
    back = pack.unpack(packed, bits=bits, columns=columns)
    assert back.dtype == torch.uint8
    assert back.is_contiguous()
    assert torch.equal(back.cpu(), codes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.bool])
def test_pack_takes_any_integers(dtype):
    codes = torch.tensor([[1, 0, 1], [0, 0, 1]]).to(dtype)
    assert pack.pack(codes, bits=1).tolist() == [[0b101], [0b100]]
    assert pack.pack(codes.t(), bits=1).tolist() == [[1], [0], [3]]


def test_packing_leaves_its_input_alone():
    codes = torch.tensor([[1, 2], [3, 0]], dtype=torch.uint8)
    packed = pack.pack(codes, bits=4)
    packed.zero_()
    assert codes.tolist() == [[1, 2], [3, 0]]


def test_bad_arguments_of_pack():
    codes = torch.tensor([0, 15])
    with pytest.raises(ValueError, match=r"\[0, 15\] do not fit 2 bits"):
        pack.pack(codes, bits=2)
    with pytest.raises(ValueError, match="shift or clamp"):
        pack.pack(codes - 8, bits=4)
    with pytest.raises(ValueError, match="do not fit"):
        pack.pack(torch.tensor([256]), bits=4)
    for bits in (0, 3, 5, 16):
        with pytest.raises(ValueError, match="do not divide a byte"):
            pack.pack(codes, bits=bits)
    with pytest.raises(ValueError, match="as they are"):
        pack.unpack(codes.to(torch.uint8), bits=8, columns=2)
    with pytest.raises(TypeError, match="integer codes"):
        pack.pack(codes.float(), bits=4)
    with pytest.raises(TypeError, match="uint8"):
        pack.unpack(codes, bits=4, columns=4)
    for columns in (2, 5):
        with pytest.raises(ValueError, match="bytes"):
            pack.unpack(codes.to(torch.uint8), bits=4, columns=columns)
