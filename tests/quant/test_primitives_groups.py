"""torchao's primitives for groups of columns and pairs of int4 against torch.ao's observers and float64."""

from __future__ import annotations

import pytest
import torch
from primitive_cases import DTYPES, EPS, make, sqnr
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from ao_quant import primitives as q


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_bit", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "groupsize"), [(1, 128), (17, 17), (63, 9), (100, 128), (576, 32)])
def test_groupwise_affine(columns, groupsize, n_bit, dtype):
    w = make(6, columns, dtype=dtype) + 5
    w[0], w[1], w[2, 0] = 0, 5, 50
    size, half, top = min(groupsize, columns), 2 ** (n_bit - 1), 2**n_bit - 1
    scales, zeros = q.get_groupwise_affine_qparams(w, n_bit, groupsize)
    groups = w.double().reshape(6, -1, size)
    span = (groups.amax(-1) - groups.amin(-1)).clamp_min(1e-6)
    for got, want in ((scales, span / top), (zeros, groups.amin(-1) + half * span / top)):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=0)

    codes, packed = q.groupwise_affine_quantize_tensor(w, n_bit, groupsize)
    assert codes.dtype == torch.int32
    assert codes.shape == w.shape
    assert codes.min() >= 0
    assert codes.max() <= top
    s, z = (t.double().repeat_interleave(size, 1) for t in (scales, zeros))
    want = ((w.double() - (z - half * s)) / s).clamp(0, top)
    assert ((codes - want).abs() <= 0.5 + 1e-3 * top).all()
    back = q.groupwise_affine_dequantize_tensor(codes, packed, n_bit, groupsize)
    assert back.dtype == torch.bfloat16
    torch.testing.assert_close(back.double(), (codes - half) * s + z, rtol=2**-8, atol=1e-6)
    byte = q.groupwise_affine_dequantize_tensor(codes.to(torch.uint8), packed, n_bit, groupsize)
    assert torch.equal(byte, back)


def test_groupwise_affine_one_column_at_a_time():
    w = make(6, 64)
    scales, zeros = q.get_groupwise_affine_qparams(w, 4, 32)
    whole = q.groupwise_affine_quantize_tensor_from_qparams(w, scales, zeros, 4, 32)
    back = q.groupwise_affine_dequantize_tensor_from_qparams(whole, scales, zeros, 4, 32)
    for j in range(64):
        own = scales[:, j // 32 : j // 32 + 1], zeros[:, j // 32 : j // 32 + 1]
        codes = q.groupwise_affine_quantize_tensor_from_qparams(w[:, j : j + 1], *own, 4, 32)
        assert torch.equal(codes, whole[:, j : j + 1])
        one = q.groupwise_affine_dequantize_tensor_from_qparams(codes, *own, 4, 32)
        assert torch.equal(one, back[:, j : j + 1])


def test_groupwise_sqnr_of_four_bits():
    w = make(64, 256)
    back = q.groupwise_affine_dequantize_tensor(*q.groupwise_affine_quantize_tensor(w, 4, 32), 4, 32)
    assert sqnr(w, back) > 20


def test_tinygemm_qparams_come_back():
    scales, zeros = make(5, 3, dtype=torch.bfloat16), make(5, 3, dtype=torch.bfloat16, seed=1)
    packed = q.pack_tinygemm_scales_and_zeros(scales, zeros)
    assert packed.shape == (3, 5, 2)
    assert packed.is_contiguous()
    assert packed[1, 4].tolist() == [scales[4, 1], zeros[4, 1]]
    for got, want in zip(q.unpack_tinygemm_scales_and_zeros(packed), (scales, zeros), strict=True):
        assert torch.equal(got, want)


def test_bad_arguments_groupwise():
    w = make(4, 100)
    scales = zeros = torch.ones(4, 1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="does not divide 100"):
        q.get_groupwise_affine_qparams(w, 4, 32)
    with pytest.raises(ValueError, match="does not divide 100"):
        q.group_quantize_tensor_symmetric(w, 4, 32)
    with pytest.raises(ValueError, match="at least 2"):
        q.get_groupwise_affine_qparams(w, 4, 1)
    with pytest.raises(ValueError, match="n_bit"):
        q.get_group_qparams_symmetric(w, 1)
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        q.get_groupwise_affine_qparams(w[0])
    with pytest.raises(ValueError, match="does not divide"):
        q.get_groupwise_affine_qparams(w[:, :0])
    with pytest.raises(TypeError, match="int8"):
        q.get_groupwise_affine_qparams(w.to(torch.int8))
    with pytest.raises(TypeError, match="int8"):
        q.groupwise_affine_quantize_tensor_from_qparams(w.to(torch.int8), scales, zeros)
    with pytest.raises(ValueError, match="scales and zeros"):
        q.groupwise_affine_quantize_tensor_from_qparams(w, scales, zeros, 4, 50)
    with pytest.raises(TypeError, match="bfloat16"):
        q.pack_tinygemm_scales_and_zeros(scales.float(), zeros)
    with pytest.raises(ValueError, match=r"\[N, G\]"):
        q.pack_tinygemm_scales_and_zeros(scales, zeros[:2])
    with pytest.raises(ValueError, match=r"\[G, N, 2\]"):
        q.unpack_tinygemm_scales_and_zeros(scales)


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("n_bit", [4, 8])
def test_group_symmetric_equals_the_observer(n_bit, precision):
    w = make(10, 512, dtype=torch.float16)
    low, high = -(2 ** (n_bit - 1)), 2 ** (n_bit - 1) - 1
    observer = PerChannelMinMaxObserver(
        0, torch.qint8, torch.per_channel_symmetric, quant_min=low, quant_max=high, eps=EPS
    )
    observer(w.reshape(-1, 256))
    want, _ = observer.calculate_qparams()
    scales, zeros = q.get_group_qparams_symmetric(w, n_bit, 256, precision)
    torch.testing.assert_close(scales, want.reshape(10, 2).to(precision), rtol=0, atol=0)
    assert scales.shape == zeros.shape == (10, 2)
    assert zeros.dtype == precision
    assert not zeros.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_bit", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("columns", "groupsize"), [(1, 32), (63, 9), (100, 128), (576, 32)])
def test_group_symmetric_codes_have_the_bits_asked_for(columns, groupsize, n_bit, dtype):
    w = make(6, columns, dtype=dtype)
    w[0] = 0
    codes, scales, zeros = q.group_quantize_tensor_symmetric(w, n_bit, groupsize)
    low, high = -(2 ** (n_bit - 1)), 2 ** (n_bit - 1) - 1
    assert codes.dtype == torch.int8
    assert codes.shape == w.shape
    assert not zeros.any()
    assert codes.min() >= low
    assert codes.max() <= high
    step = scales.double().repeat_interleave(min(groupsize, columns), 1)
    want = (w.double() / step).clamp(low, high)
    assert ((codes - want).abs() <= 0.5 + 1e-4).all()
    if columns > 1:
        assert max(-codes.min().item() - 1, codes.max().item()) == high
    with pytest.raises(ValueError, match="NaN"):
        q.get_group_qparams_symmetric(torch.full((1, 4), torch.nan), n_bit, 4)


def test_int4_pairs_come_back_signs_and_all():
    every = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = q.pack_int4_from_int8(every.reshape(2, -1))
    assert packed.dtype == torch.int8
    assert packed.shape == (2, 128)
    want = [(hi % 16) * 16 + lo % 16 for hi, lo in every.tolist()]
    assert packed.view(torch.uint8).flatten().tolist() == want
    for view in (packed, packed.view(torch.uint8)):
        assert torch.equal(q.unpack_int4_to_int8(view), every.reshape(2, -1))


def test_bad_arguments_of_int4_pairs():
    codes = torch.tensor([[-8, 7]], dtype=torch.int8)
    with pytest.raises(ValueError, match="pad to even"):
        q.pack_int4_from_int8(codes[:, :1])
    for bad in (codes - 1, codes + 1):
        with pytest.raises(ValueError, match="4 signed bits"):
            q.pack_int4_from_int8(bad)
    with pytest.raises(TypeError, match="int64"):
        q.pack_int4_from_int8(codes.long())
    with pytest.raises(TypeError, match="int64"):
        q.unpack_int4_to_int8(codes.long())
