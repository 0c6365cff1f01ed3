"""The packed tensor of unsigned 4-bit integers against plain uint8, and the scheme on top of it."""

import pytest
import torch

import ao_core as ao
from ao_quant.uint4 import UInt4Tensor


def codes_of(*shape):
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def same(tensor, codes):
    assert isinstance(tensor, UInt4Tensor) and tensor.shape == codes.shape
    assert torch.equal(tensor.to(torch.uint8), codes)


@pytest.mark.parametrize("shape", [(1,), (17,), (3, 8), (2, 3, 17), (63, 100)])
def test_packing_and_back(shape):
    codes = codes_of(*shape)
    tensor = UInt4Tensor.from_uint8(codes)
    same(tensor, codes)
    assert tensor.packed.shape == (*shape[:-1], -(-shape[-1] // 2))
    assert torch.equal(tensor.to(torch.float32), codes.float())
    for again in (tensor.clone(), tensor.detach(), tensor.to("cpu"), tensor.view(torch.uint4)):
        same(again, codes)


def test_views_share_memory():
    codes = codes_of(4, 6, 8)
    tensor = UInt4Tensor.from_uint8(codes)
    for size in ((24, 8), (4, 48), (192,), (2, -1, 8), (4, 6, 2, 4)):
        same(tensor.view(*size), codes.view(*size))
    tensor.view(torch.uint8).zero_()
    same(tensor, torch.zeros_like(codes))


def test_the_dtype_view_is_the_packed_bytes():
    tensor = UInt4Tensor.from_uint8(torch.tensor([[1, 2, 3]], dtype=torch.uint8))
    assert tensor.view(torch.uint8).tolist() == [[0x21, 0x03]]


def test_cuts():
    codes = codes_of(5, 6, 9)
    tensor = UInt4Tensor.from_uint8(codes)
    same(tensor[1:4], codes[1:4])
    same(tensor[:, ::2], codes[:, ::2])
    same(tensor[..., 2:7], codes[..., 2:7])
    same(tensor[..., 4:], codes[..., 4:])
    same(tensor[3], codes[3])
    same(tensor.select(1, -1), codes[:, -1])
    for column in (0, 5, 8, -1):
        assert torch.equal(tensor.select(2, column), codes[..., column])
    for part, expected in zip(tensor.unbind(1), codes.unbind(1), strict=True):
        same(part, expected)
    same(tensor[0].t(), codes[0].t())


def test_equality():
    codes = codes_of(3, 7)
    tensor, other = UInt4Tensor.from_uint8(codes), UInt4Tensor.from_uint8(codes.flip(0))
    assert torch.equal(tensor == other, codes == codes.flip(0))
    assert torch.equal(tensor == 3, codes == 3)
    assert (tensor == codes).all()


@pytest.mark.parametrize(
    ("act", "match"),
    [
        (lambda t: t + 1, r"UInt4Tensor does not implement aten.add"),
        (lambda t: t[..., 1:], r"columns \[1:7:1\], only those from an even one"),
        (lambda t: t.view(21), r"rows of an odd length stay"),
        (lambda t: t.view(torch.int16), r"only as torch.uint8"),
    ],
)
def test_what_it_can_not_do_is_said(act, match):
    with pytest.raises(NotImplementedError, match=match + r".*|.*to\(torch.uint8\)"):
        act(UInt4Tensor.from_uint8(codes_of(3, 7)))


def test_bad_codes():
    with pytest.raises(ValueError, match=r"codes in \[0, 16\] do not fit 4 bits"):
        UInt4Tensor.from_uint8(torch.arange(17))
    with pytest.raises(TypeError, match="integer codes"):
        UInt4Tensor.from_uint8(torch.ones(4))
    with pytest.raises(ValueError, match=r"9 columns of 4 bits are uint8 \[\.\.\., 5\]"):
        UInt4Tensor(torch.zeros(2, 4, dtype=torch.uint8), 9)


def test_negative_weights_keep_their_sign():
    """A scale of absmax / 7.5 with codes from 0 on, and zero in the middle of them."""
    weight = torch.tensor([[-7.5, -3.0, -0.4, 0.0, 0.4, 3.0, 7.4]])
    quantized = ao.parse_scheme("uint4").quantize(weight)
    assert quantized.codes.to(torch.uint8).tolist() == [[0, 5, 8, 8, 8, 11, 15]]
    assert quantized.dequantize().tolist() == [[-8.0, -3.0, 0.0, 0.0, 0.0, 3.0, 7.0]]
