"""Each way to multiply by weights in codes, against float64, in sizes that no tile divides."""

from __future__ import annotations

import pytest
import torch
from kernel_weights import KINDS, LEAST, codes

import ao_core as ao
from ao_core.numerics import pack
from ao_core.testing.kernels import poisoned_memory
from ao_kernels import int8_mm, support
from ao_kernels import weight_linear as launching
from ao_kernels.configs import Decoded, Few, Gemm, Many, Parts, Registers, Specialized, weight_config
from ao_kernels.support import hopper
from ao_kernels.weight_linear import Codes, dequantized, rows_of, weight_linear

CONFIGS = {
    "one row": Few(8, 8, 1, 2, 64, 3),
    "few rows, one part": Few(1, 32, 16, 2, 64, 4),
    "few rows, two parts": Few(2, 16, 8, 2, 32, 3),
    "few rows, levels in shared memory": Few(4, 16, 2, 2, 32, 3, copies=32),
    "many rows": Many(64, 64, 4, 64, 3, 1),
    "many rows, cut in four": Many(32, 16, 4, 32, 3, 4),
    "decoded": Decoded(),
    "decoded a few rows at a time": Decoded(megabytes=0),
}
SIZES = [(1, 20, 63), (17, 33, 100), (20, 1, 17), (5, 9, 576)]  # M, N, K


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_against_float64(kind, config, device):
    for index, (m, n, k) in enumerate(SIZES):
        dtype = (torch.bfloat16, torch.float16)[index % 2]
        weight, values = codes(kind, n, k, device)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(n)) if index % 2 == 0 else None
        expected = x.double() @ values.t() + (0 if bias is None else bias.double())
        with poisoned_memory():
            found = weight_linear(x.to(device), weight, None if bias is None else bias.to(device), config)
        assert found.dtype == dtype
        assert found.shape == (m, n)
        assert ao.sqnr(expected, found.cpu()) > LEAST[dtype], (m, n, k)


OF_HOPPER = (
    Specialized(64, 128, 128, 2, 2, 1, 1),
    Specialized(128, 128, 64, 3, 2, 1, 4),
    Specialized(256, 128, 32, 4, 2, 8, 2),
    Specialized(128, 64, 64, 3, 4, 2, 1),
    Registers(16, 8, 3, 1, 4),
    Registers(64, 8, 3, 1, 1),
    Registers(128, 6, 3, 1, 2),
    Registers(256, 5, 2, 4, 1),
    Registers(64, 8, 3, 1, 2, table=True),
    Registers(256, 4, 2, 1, 2, table=True),
    Parts(4, 64, 16, 64, 2),
    Parts(8, 32, 16, 64, 3),
    Parts(8, 16, 16, 128, 2),
    Parts(4, 32, 32, 32, 4),
    Parts(8, 32, 32, 64, 2),
)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and hopper(torch.device("cuda"))), reason="kernels for Hopper, in Gluon"
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", OF_HOPPER, ids=repr)
def test_the_kernels_for_hopper_against_float64(kind, config, device):
    for index, (m, n, k) in enumerate(((1, 20, 64), (100, 130, 576), (300, 1000, 4128), (17, 257, 1056))):
        dtype = (torch.bfloat16, torch.float16)[index % 2]
        weight, values = codes(kind, n, k, device)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(n)) if index % 2 == 0 else None
        expected = x.double() @ values.t() + (0 if bias is None else bias.double())
        with poisoned_memory():
            found = [
                weight_linear(x.to(device), weight, None if bias is None else bias.to(device), config)
                for _ in range(5)
            ]
        assert ao.sqnr(expected, found[0].cpu()) > LEAST[dtype], (m, n, k)
        assert all(torch.equal(found[0], each) for each in found), (m, n, k)  # no race


@pytest.mark.parametrize("group_size", [32, 96])
def test_fine_groups_take_tiles_of_their_own(group_size, device):
    for m, n, k in ((1, 17, 100), (2, 9, 576), (4, 1, 193), (8, 33, 256), (16, 20, 192)):
        generator = torch.Generator().manual_seed(m)
        values = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        scale = torch.rand(n, -(-k // group_size), generator=generator) / 10 + 0.01
        weight = Codes("int4", pack.pack(values, bits=4).to(device), scale.to(device), group_size)
        x = torch.randn(m, k, generator=generator).bfloat16()
        for narrow in (False, True):
            tiles = weight_config("int4", m, 4096 if narrow else 14336, 4096, fine=weight.fine)
            assert weight.fine and isinstance(tiles, Few) and tiles.bytes == 16
            with poisoned_memory():
                found = weight_linear(x.to(device), weight, None, tiles)
            floats = (values.double() - 8) * scale.double()[:, torch.arange(k) // group_size]
            assert ao.sqnr(x.double() @ floats.t(), found.cpu()) > LEAST[torch.bfloat16], (m, n, k)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_bytes_in_fine_groups_take_tiles_of_their_own(kind, device):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-100, 100, (33, 192), generator=generator).to(torch.int8)
    stored = values if kind == "int8" else values.float().to(torch.float8_e4m3fn)
    scale = torch.rand(33, 6, generator=generator) / 10 + 0.01
    weight = Codes(kind, stored.to(device), scale.to(device), 32)
    coarse = Codes(kind, stored, scale[:, :3], 64)
    assert weight.fine and not coarse.fine and not Codes(kind, stored, scale[:, :1]).fine
    x = torch.randn(1, 192, generator=generator).bfloat16()
    for narrow in (False, True):
        tiles = weight_config(kind, 1, 4096 if narrow else 14336, 4096, fine=True)
        assert isinstance(tiles, Few) and tiles.bytes == 32
        with poisoned_memory():
            found = weight_linear(x.to(device), weight, None, tiles)
        floats = stored.double() * scale.double().repeat_interleave(32, 1)
        assert ao.sqnr(x.double() @ floats.t(), found.cpu()) > LEAST[torch.bfloat16]
    assert all(
        isinstance(weight_config(kind, m, 4096, 4096, hopper=True, fine=True), Parts) for m in (2, 8, 32)
    )
    assert weight_config(kind, 2, 4096, 4096, fine=True) == weight_config(kind, 2, 4096, 4096)


def test_tiles_of_the_last_round_are_cut_where_half_of_the_device_would_be_idle():
    hopper_linear = pytest.importorskip("ao_kernels.hopper_linear", reason="a Triton without Gluon")
    for tiles, tiles_k, most, parts, whole in (
        (448, 16, 2, 2, 396),  # 14336 x 4096, 1024 rows: 3 rounds of 132, and 52 tiles in halves
        (32, 16, 4, 4, 0), (64, 16, 4, 2, 0), (33, 16, 4, 4, 0), (34, 16, 4, 3, 0),
        (112, 16, 4, 1, 112), (132, 16, 4, 1, 132), (336, 16, 4, 1, 336),
        (1, 3, 4, 3, 0), (1, 1, 4, 1, 1), (5, 5, 4, 3, 0),  # no part without a tile of K
    ):  # fmt: skip
        assert hopper_linear._cut(tiles, tiles_k, 132, most) == (parts, whole), (tiles, tiles_k)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_what_the_copy_engine_cannot_read_goes_another_way(kind, device):
    for m, n, k in ((40, 33, 97), (17, 20, 72)):  # rows of codes do not start at multiples of 16 bytes
        weight, values = codes(kind, n, k, device)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).half()
        for config in (
            Specialized(64, 128, 64, 3, 2, 1, 1),
            Registers(64, 8, 3, 1, 1),
            Parts(4, 64, 16, 64, 2),
        ):
            found = weight_linear(x.to(device), weight, None, config)
            assert ao.sqnr(x.double() @ values.t(), found.cpu()) > LEAST[torch.float16]


def test_groups_too_fine_for_parts_of_k_go_through_registers(monkeypatch):
    monkeypatch.setattr(launching, "hopper", lambda device: True)
    x = torch.zeros(20, 320, dtype=torch.bfloat16)
    for group_size, kind in ((40, Registers), (32, Parts), (96, Parts), (-1, Parts)):
        scale = torch.ones(7, 1 if group_size < 0 else -(-320 // group_size))
        weight = Codes("int4", torch.zeros(7, 160, dtype=torch.uint8), scale, group_size)
        found = launching._runnable(Parts(4, 64, 32, 64, 2), weight, x)
        assert isinstance(found, kind) and found.block_m == 32, group_size


@pytest.mark.parametrize("kind", ["int4", "nf4", "int8", "float8"])
def test_hopper_has_tiles_of_its_own_from_some_rows_on(kind):
    own = (Specialized, Registers, Parts)
    for n in (4096, 14336):
        assert all(isinstance(weight_config(kind, m, n, 4096, hopper=True), Parts) for m in (9, 16, 32))
        assert all(isinstance(weight_config(kind, m, n, 4096, hopper=True), own) for m in (64, 128, 256, 512))
        assert isinstance(weight_config(kind, 1, n, 64, hopper=True), Few)
        assert not any(isinstance(weight_config(kind, m, n, 4096), own) for m in (1, 16, 64, 512, 4096))
    assert isinstance(weight_config("int4", 10**6, 4096, 4096, hopper=True), Registers)
    assert isinstance(weight_config("int4", 10**6, 14336, 4096, hopper=True), Decoded)
    deep, shallow = (weight_config("int4", 512, 4096, k, hopper=True) for k in (14336, 4096))
    assert deep != shallow


@pytest.mark.parametrize("kind", ["int4", "nf4", "int8", "float8"])
def test_small_outputs_on_hopper_take_a_program_to_a_multiprocessor(kind):
    for m, n in ((5, 1), (16, 1024), (17, 576), (32, 2048), (64, 1024), (64, 2048), (100, 1000), (128, 1024)):
        for fine in (False, True):
            tiles = weight_config(kind, m, n, 4096, hopper=True, fine=fine)
            assert isinstance(tiles, Parts)
            assert -(-m // tiles.block_m) * -(-n // tiles.block_n) <= 128
    for m, n in ((4, 1024), (128, 2048), (129, 1024), (64, 4096)):
        assert weight_config(kind, m, n, 4096, hopper=True) == weight_config(kind, m, 4096, 4096, hopper=True)
    assert not isinstance(weight_config(kind, 64, 1024, 4096), Parts)


def test_without_gluon_the_other_kernels_run_and_a_warning_says_why(monkeypatch, caplog):
    def missing(name):
        raise ImportError(f"no gluon for {name}")

    monkeypatch.setattr(support, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(support.importlib, "import_module", missing)
    assert not support.hopper.__wrapped__(torch.device("cuda"))
    assert "no gluon for ao_kernels.hopper_linear" in caplog.text
    assert "pip install -U triton" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_rows(kind, device):
    for n, k in ((100, 63), (17, 576), (1, 97)):
        weight, values = codes(kind, n, k, device)
        rows = slice(n // 3, n)
        with poisoned_memory():
            found = dequantized(weight, k, torch.bfloat16, rows)
        assert ao.sqnr(values[rows], found.cpu()) > LEAST[torch.bfloat16], (n, k)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_where_triton_takes_no_narrow_products_tiles_are_wider(kind, device, monkeypatch):
    """Triton 3.4 refuses those of less than 16 columns."""
    monkeypatch.setattr("ao_kernels.weight_linear.least_columns", lambda: 16)
    assert all(rows_of(Few(splits, 8, 1, 2, 64, 3)) * splits == 16 for splits in (1, 2, 4, 8))
    weight, values = codes(kind, 17, 96, device)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    for rows in (1, 3):
        with poisoned_memory():
            found = weight_linear(x[:rows].to(device), weight, None, Few(4, 16, 2, 2, 32, 3))
        assert ao.sqnr(x[:rows].double() @ values.t(), found.cpu()) > LEAST[torch.bfloat16]


def test_words_of_two_activations_are_copied_where_they_are_not_aligned(device):
    weight, values = codes("int4", 17, 64, device)
    wide = torch.randn(6, 131, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    for x in (wide[1:, 1:65], wide[:, ::2][:, :64], wide.t()[:64].t()):
        found = weight_linear(x, weight, None)
        assert ao.sqnr(x.cpu().double() @ values.t(), found.cpu()) > LEAST[torch.bfloat16]


def test_leading_dimensions_and_no_rows(device):
    weight, values = codes("nf4", 9, 96, device)
    x = torch.randn(2, 3, 5, 96).half().to(device)
    assert ao.sqnr(x.cpu().double() @ values.t(), weight_linear(x, weight, None).cpu()) > LEAST[torch.float16]
    assert weight_linear(x[:0], weight, None).shape == (0, 3, 5, 9)


def test_a_wrong_number_of_columns_is_named(device):
    weight, _ = codes("int4", 9, 96, device)
    with pytest.raises(RuntimeError, match=r"95 or 96 input features was given an input \(2, 97\)"):
        weight_linear(torch.zeros(2, 97, dtype=torch.bfloat16, device=device), weight, None)


GEMMS = (
    Gemm("pointers", 16, 32, 64, 4, 3, 0, 1),
    Gemm("pointers", 32, 16, 128, 4, 3, 0, 2),
    Gemm("copy engine", 64, 64, 64, 4, 3, 0, 1),
    Gemm("copy engine", 64, 64, 128, 4, 3, 2, 8),
)


@pytest.mark.parametrize("config", GEMMS, ids=repr)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 17, 63), (70, 63, 144), (17, 1, 1), (63, 65, 48), (66, 33, 256)]
)
def test_sums_of_int8_products_are_exact(m, n, k, config, device):
    generator = torch.Generator().manual_seed(m)
    x, w = (torch.randint(-128, 128, (rows, k), generator=generator, dtype=torch.int8) for rows in (m, n))
    x[0], w[0] = -128, -128  # the largest sum
    with poisoned_memory():
        found = int8_mm.scaled_mm(x.to(device), w.to(device), None, None, None, torch.int32, config)
    assert torch.equal(found.cpu().long(), x.long() @ w.long().t())


@pytest.mark.parametrize("k", [1, 17, 576, 9000])
def test_rows_are_quantized_as_in_float32(k, device):
    from ao_core.numerics import affine

    x = torch.randn(5, k, generator=torch.Generator().manual_seed(k)).bfloat16()
    x[1], x[2, 0], x[3] = 0, 3e38, x[3] * 1e-4
    codes, scale = int8_mm.quantize_rows(x.to(device))
    expected, expected_scale = affine.quantize_per_token(x)
    assert torch.equal(codes.cpu(), expected)
    assert torch.equal(scale.cpu(), expected_scale.flatten())


def test_rows_that_are_not_finite_stay_so(device):
    x = torch.ones(3, 40, dtype=torch.bfloat16)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    _, scale = int8_mm.quantize_rows(x.to(device))
    assert scale.isfinite().tolist() == [False, False, True]
    assert scale[0].isnan()
