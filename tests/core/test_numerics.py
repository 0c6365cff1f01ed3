"""The numerics against numpy in float64, torch.ao's observers and searches without cleverness."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver
from torch.utils._python_dispatch import TorchDispatchMode

from ao_core.numerics import affine, codebook, pack

SIZES = [1, 17, 63, 100, 576]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
EPS = np.float32(np.finfo(np.float32).eps)


def make(*shape, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def hard_rows(columns, dtype=torch.float32, device="cpu"):
    """Zeros, a constant, an outlier, tiny, large, all positive, all negative, ordinary."""
    rows = make(8, columns)
    rows[0] = 0
    rows[1] = -0.37
    rows[2, 0] = 1000
    rows[3] *= 1e-7
    rows[4] *= 1e3
    rows[5] = rows[5].abs() + 5
    rows[6] = -rows[6].abs() - 5
    return rows.to(device, dtype)


def groups_of(row, size):
    return [row[start : start + size] for start in range(0, len(row), size)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("group_size", [-1, 1, 32, 100, 4096])
def test_scales_are_those_of_each_group_alone(columns, group_size, dtype, device):
    weight = hard_rows(columns, dtype, device)
    scale = affine.choose_symmetric(weight, qmin=-128, qmax=127, group_size=group_size)
    ascale, zero = affine.choose_affine(weight, qmin=0, qmax=15, group_size=group_size)
    size = columns if group_size == -1 else group_size
    for n, row in enumerate(weight.double().cpu().numpy().astype(np.float32)):
        groups = groups_of(row, size)
        assert scale.shape == ascale.shape == zero.shape == (8, len(groups))
        assert (scale.dtype, ascale.dtype, zero.dtype) == (
            torch.float32,
            torch.float32,
            torch.int32,
        )
        # CUDA divides by a constant through its reciprocal: off by an ulp at most.
        ulp = 0.0 if weight.device.type == "cpu" else 1.2e-7
        for g, group in enumerate(groups):
            expected = max(np.abs(group).max() / np.float32(127.5), EPS)
            assert scale[n, g].item() == pytest.approx(expected, rel=ulp, abs=0)
            low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
            step = max((high - low) / np.float32(15), EPS)
            assert ascale[n, g].item() == pytest.approx(step, rel=ulp, abs=0)
            if weight.device.type == "cpu":  # elsewhere an ulp decides between two at a tie
                assert zero[n, g].item() == np.clip(-np.round(low / step), 0, 15)


@pytest.mark.parametrize(("qmin", "qmax", "half"), [(-128, 127, 127.5), (-127, 127, 127), (-8, 7, 7.5)])
def test_symmetric_divides_by_half_the_width(qmin, qmax, half):
    scale = affine.choose_symmetric(torch.tensor([[3.0, -half]]), qmin=qmin, qmax=qmax)
    assert scale.tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
def test_affine_equals_the_observers(columns, dtype):
    weight = hard_rows(columns, dtype)
    whole = MinMaxObserver(torch.qint8, torch.per_tensor_affine, quant_min=-128, quant_max=127)
    each = PerChannelMinMaxObserver(0, torch.qint8, torch.per_channel_affine, quant_min=-128, quant_max=127)
    for observer, view in ((whole, weight.reshape(1, -1)), (each, weight)):
        observer(weight)
        want_scale, want_zero = observer.calculate_qparams()
        scale, zero = affine.choose_affine(view, qmin=-128, qmax=127)
        torch.testing.assert_close(scale.flatten(), want_scale, rtol=0, atol=0)
        assert zero.flatten().tolist() == want_zero.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_equals_the_observer(dtype):
    weight = make(40, 256, dtype=dtype)
    observer = PerChannelMinMaxObserver(
        0, torch.qint8, torch.per_channel_symmetric, quant_min=-8, quant_max=7, eps=float(EPS)
    )
    observer(weight)
    scale = affine.choose_symmetric(weight, qmin=-8, qmax=7)
    torch.testing.assert_close(scale.flatten(), observer.calculate_qparams()[0], rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_nearest(columns, group_size, dtype, symmetric, device):
    weight = hard_rows(columns, dtype, device)
    qmin, qmax = -128, 127
    if symmetric:
        scale = affine.choose_symmetric(weight, qmin=qmin, qmax=qmax, group_size=group_size)
        zero = None
    else:
        scale, zero = affine.choose_affine(weight, qmin=qmin, qmax=qmax, group_size=group_size)
    kept = weight.clone()
    codes = affine.quantize(weight, scale, qmin=qmin, qmax=qmax, zero_point=zero, group_size=group_size)
    assert torch.equal(weight, kept)
    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape

    back = affine.dequantize(codes, scale, zero_point=zero, group_size=group_size).double()
    step = scale.double().repeat_interleave(columns if group_size == -1 else group_size, 1)
    # A rounded zero point may shift an affine range by half a step, which is lost at one end.
    bound = 0.5 if symmetric else 1.0
    assert ((weight.double() - back).abs() <= bound * step[:, :columns] * (1 + 1e-4)).all()
    assert back[0].abs().max() == 0
    low = affine.dequantize(codes, scale, zero_point=zero, group_size=group_size, dtype=dtype)
    assert torch.equal(low, back.to(dtype))


def test_rounding_is_half_to_even():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes = affine.quantize(weight, torch.ones(1, 1), qmin=-8, qmax=7)
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2]]


def test_codes_are_clamped_into_the_dtype_asked_for():
    weight = torch.tensor([[-1e30, -torch.inf, 0.0, 7.0, torch.inf]])
    zero = torch.full((1, 1), 3, dtype=torch.int32)
    codes = affine.quantize(weight, torch.ones(1, 1), qmin=0, qmax=15, zero_point=zero, dtype=torch.uint8)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[0, 0, 3, 10, 15]]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_leading_dims_are_a_loop(lead):
    weight = make(*lead, 5, 100)
    flat = weight.reshape(-1, 5, 100)
    scale, zero = affine.choose_affine(weight, qmin=0, qmax=255, group_size=32)
    assert scale.shape == (*lead, 5, 4)
    options = {"qmin": 0, "qmax": 255, "group_size": 32, "dtype": torch.uint8}
    codes = affine.quantize(weight, scale, zero_point=zero, **options)
    for i, one in enumerate(flat):
        s, z = affine.choose_affine(one, qmin=0, qmax=255, group_size=32)
        assert torch.equal(codes.reshape(flat.shape)[i], affine.quantize(one, s, zero_point=z, **options))


def test_a_column_or_a_group_alone_gets_the_codes_it_has_in_the_whole():
    weight = make(7, 100)
    scale = affine.choose_symmetric(weight, qmin=-8, qmax=7, group_size=32)
    whole = affine.quantize(weight, scale, qmin=-8, qmax=7, group_size=32)
    back = affine.dequantize(whole, scale, group_size=32)
    for j in range(100):
        own = scale[:, j // 32 : j // 32 + 1]
        column = affine.quantize(weight[:, j : j + 1], own, qmin=-8, qmax=7, group_size=32)
        assert torch.equal(column, whole[:, j : j + 1])
        assert torch.equal(affine.dequantize(column, own, group_size=32), back[:, j : j + 1])
    for g, group in enumerate(weight.split(32, 1)):
        own = scale[:, g : g + 1]
        assert torch.equal(affine.quantize(group, own, qmin=-8, qmax=7), whole[:, 32 * g : 32 * (g + 1)])


def test_expand_groups():
    qparam = torch.tensor([[1, 2, 3]])
    assert affine.expand_groups(qparam, 7, 3).tolist() == [[1, 1, 1, 2, 2, 2, 3]]
    assert affine.expand_groups(torch.tensor([[4]]), 3).tolist() == [[4, 4, 4]]


@pytest.mark.parametrize(("columns", "group_size"), [(6, 3), (10, 3), (7, -1), (7, 0)])
def test_qparams_that_do_not_fit_are_refused(columns, group_size):
    with pytest.raises(ValueError, match="group_size they were chosen with"):
        affine.expand_groups(torch.ones(1, 3), columns, group_size)
    with pytest.raises(ValueError, match="group_size they were chosen with"):
        affine.quantize(make(1, columns), torch.ones(1, 3), qmin=-8, qmax=7, group_size=group_size)


def test_bad_arguments_of_affine():
    weight, scale = make(4, 4), torch.ones(4, 1)
    with pytest.raises(TypeError, match="int64"):
        affine.choose_symmetric(weight.long(), qmin=-8, qmax=7)
    with pytest.raises(TypeError, match="shape"):
        affine.choose_affine(torch.tensor(1.0), qmin=-8, qmax=7)
    with pytest.raises(ValueError, match="empty"):
        affine.choose_affine(weight, qmin=7, qmax=7)
    with pytest.raises(ValueError, match="got 0"):
        affine.choose_symmetric(weight, qmin=-8, qmax=7, group_size=0)
    with pytest.raises(ValueError, match="wider dtype"):
        affine.quantize(weight, scale, qmin=0, qmax=255)
    with pytest.raises(ValueError, match="column dim"):
        affine.quantize(weight[:, 0], scale, qmin=-8, qmax=7)
    with pytest.raises(ValueError, match="column dim"):
        affine.dequantize(torch.ones(4, dtype=torch.int8), scale)


def test_codes_and_scales_carry_no_graph():
    weight = make(4, 8).requires_grad_()
    scale, zero = affine.choose_affine(weight, qmin=0, qmax=15)
    codes, token = affine.quantize_per_token(weight)
    symmetric = affine.choose_symmetric(weight, qmin=-8, qmax=7)
    assert not any(t.requires_grad for t in (scale, zero, symmetric, codes, token))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 8)])
def test_affine_of_nothing(shape):
    weight = torch.empty(shape)
    scale, zero = affine.choose_affine(weight, qmin=0, qmax=15, group_size=4)
    codes = affine.quantize(weight, scale, qmin=0, qmax=15, zero_point=zero, group_size=4)
    assert codes.shape == shape
    assert affine.dequantize(codes, scale, zero_point=zero, group_size=4).shape == shape
    assert affine.choose_symmetric(weight, qmin=-8, qmax=7).shape == (*shape[:-1], 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("lead", [(), (1,), (17,), (2, 3)])
def test_per_token_is_exact(lead, columns, dtype, device):
    x = make(*lead, columns, dtype=dtype, device=device)
    codes, scale = affine.quantize_per_token(x)
    assert (codes.dtype, codes.shape) == (torch.int8, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (*lead, 1))
    exact = x.double().cpu().numpy().astype(np.float32)
    want = np.maximum(np.abs(exact).max(-1, keepdims=True), np.float32(1e-5)) / np.float32(127)
    found = scale.cpu().numpy()
    if device == "cpu":
        assert np.array_equal(found, want)
    else:  # CUDA divides by a constant through its reciprocal
        np.testing.assert_allclose(found, want, rtol=1.2e-7)
    assert np.array_equal(codes.cpu().numpy(), np.round(exact / found).astype(np.int8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token_on_hard_rows(dtype):
    x = hard_rows(576, dtype)
    codes, scale = affine.quantize_per_token(x)
    assert codes.abs().max() == 127
    assert codes[0].abs().max() == 0
    assert (codes[1] == -127).all()
    assert codes[2, 0] == 127
    assert codes[2, 1:].abs().max() <= 1
    assert ((codes.double() * scale - x).abs() <= 0.5 * scale * (1 + 1e-5)).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_per_token_of_nothing(shape):
    codes, scale = affine.quantize_per_token(torch.empty(shape, dtype=torch.bfloat16))
    assert (codes.shape, codes.dtype) == (shape, torch.int8)
    assert (scale.shape, scale.dtype) == ((*shape[:-1], 1), torch.float32)
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_per_token_does_not_hide_what_is_not_finite(bad):
    x = make(3, 17)
    x[1, 5] = bad
    codes, scale = affine.quantize_per_token(x)
    assert torch.isfinite(scale.flatten()).tolist() == [True, False, True]
    assert not torch.isfinite(codes[1] * scale[1]).any()


def test_bad_arguments_of_per_token():
    with pytest.raises(ValueError, match="too small"):
        affine.quantize_per_token(make(2, 2), eps=0)
    with pytest.raises(TypeError, match="float"):
        affine.quantize_per_token(torch.ones(2, 2, dtype=torch.int8))
    assert affine.quantize_per_token(torch.full((1, 3), 1e-20), eps=1e-30)[0].tolist() == [[127] * 3]


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


def round_trip(weight):
    scale, zero = affine.choose_affine(weight, qmin=0, qmax=15, group_size=32)
    codes = affine.quantize(weight, scale, qmin=0, qmax=15, zero_point=zero, group_size=32, dtype=torch.uint8)
    packed = pack.pack(codes, bits=4)
    codes = pack.unpack(packed, bits=4, columns=weight.shape[-1])
    return affine.dequantize(codes, scale, zero_point=zero, group_size=32), packed


def activations(x):
    codes, scale = affine.quantize_per_token(x)
    levels = torch.tensor([-1.0, -0.5, 0.0, 2.0])
    return codes, scale, codebook.decode(codebook.encode(x, levels), levels)


@pytest.mark.parametrize("function", [round_trip, activations])
def test_one_graph_for_any_row_count(function):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, columns in itertools.product((2, 5), (100,)):
        x = make(rows, columns)
        for got, want in zip(compiled(x), function(x), strict=True):
            assert torch.equal(got, want)
