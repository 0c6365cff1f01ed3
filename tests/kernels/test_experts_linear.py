"""Stacks of experts against float64: each kernel, offsets of every kind, sizes that no tile divides."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_weights import KINDS, LEAST, codes

import ao_core as ao
from ao_core.testing.kernels import poisoned_memory
from ao_kernels import experts_linear
from ao_kernels.configs import Decoded, Few, Many, Registers, experts_config
from ao_kernels.experts_linear import stacked
from ao_kernels.support import hopper

CONFIGS = {
    "few rows, one at a time": Few(8, 8, 1, 2, 64, 3),
    "few rows": Few(2, 16, 8, 2, 32, 3),
    "many rows": Many(32, 16, 4, 32, 3, 1),
    "decoded": Decoded(),
    "the table's": None,
}
# Where experts end, rows: none at all for some, one, many, and rows behind the last that belong to none.
OFFSETS = {
    "uneven": ([0, 1, 1, 20, 23], 23),
    "rows of none": ([3, 3, 9, 9, 11], 30),
    "all to the last": ([0, 0, 0, 0, 20], 20),
    "nothing": ([0, 0, 0, 0, 0], 7),
}
PARTS = ("codes", "scale", "zero", "offset", "step")


def stack(kind, experts, n, k, device):
    """A stack of unlike experts, and its float64 values ``[E, N, K]``."""
    made = [codes(kind, n, k, device, seed=e) for e in range(experts)]
    first = made[0][0]
    shared = kind == "float8, one scale"

    def joined(name):
        if getattr(first, name) is None or (shared and name == "scale"):
            return getattr(first, name)
        return torch.stack([getattr(weight, name) for weight, _ in made])

    values = torch.stack([values for _, values in made])
    if shared:
        factors = torch.stack([weight.scale.cpu().double() for weight, _ in made])
        values = values / factors * factors[0]
    return dataclasses.replace(first, **{name: joined(name) for name in PARTS}), values


def rows_of(m, k, dtype):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)


def expected_rows(x, values, ends):
    out = torch.zeros(x.shape[0], values.shape[1], dtype=torch.float64)
    start = 0
    for weight, end in zip(values, ends, strict=True):
        out[start:end] = x[start:end].double() @ weight.t()
        start = end
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_against_float64(kind, config, device):
    first = KINDS.index(kind) % 2  # two of the four for each kind, all of them for each config
    for index, (ends, rows) in list(enumerate(OFFSETS.values()))[first::2]:
        n, k = ((17, 100), (9, 160), (1, 63), (9, 1))[index]
        # Decoded, torch multiplies, in multiples of 8 columns of bfloat16.
        n, k = (n + 7 & ~7, k + 7 & ~7) if isinstance(config, Decoded) else (n, k)
        dtype = torch.bfloat16 if index % 2 == 0 or isinstance(config, Decoded) else torch.float16
        weight, values = stack(kind, len(ends), n, k, device)
        x = rows_of(rows, k, dtype)
        offsets = torch.tensor(ends, dtype=(torch.int32, torch.int64)[index % 2], device=device)
        with poisoned_memory():
            found = experts_linear.experts_linear(x.to(device), offsets, *stacked(weight), config)
        expected = expected_rows(x, values, ends)
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        beyond = found[ends[-1] :]
        assert torch.equal(beyond, torch.zeros_like(beyond))
        if ends[-1]:
            assert ao.sqnr(expected, found.cpu()) > LEAST[dtype], (ends, n, k)


@pytest.mark.parametrize("kind", ["int4, midpoints", "nf4, double", "int8, groups", "float8, one scale"])
@pytest.mark.parametrize("config", [each for name, each in CONFIGS.items() if "one" not in name], ids=repr)
def test_equal_shares_against_float64(kind, config, device):
    for experts, each, n, k in ((3, 1, 17, 100), (1, 17, 8, 63), (2, 9, 33, 64)):
        weight, values = stack(kind, experts, n, k, device)
        x = rows_of(experts * each, k, torch.float16)
        with poisoned_memory():
            found = experts_linear.experts_linear(x.to(device), None, *stacked(weight), config)
        expected = torch.bmm(x.double().view(experts, each, k), values.transpose(1, 2)).flatten(0, 1)
        assert ao.sqnr(expected, found.cpu()) > LEAST[torch.float16], (experts, each, n, k)


OF_HOPPER = (
    Registers(16, 8, 3, 8, 1), Registers(128, 6, 3, 2, 1), Registers(256, 4, 2, 1, 1, table=True)
)  # fmt: skip


@pytest.mark.skipif(
    not (torch.cuda.is_available() and hopper(torch.device("cuda"))), reason="a kernel for Hopper, in Gluon"
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", OF_HOPPER, ids=repr)
def test_the_kernel_for_hopper_against_float64(kind, config, device):
    many = list(range(0, 1300, 10))
    cases = (*OFFSETS.values(), ([300, 300, 301, 950], 1000), (many, 1333), ([70], 70))
    for index, (ends, rows) in enumerate(cases):
        n, k = ((20, 64), (130, 576), (257, 1056))[index % 3]
        dtype = (torch.bfloat16, torch.float16)[index % 2]
        weight, values = stack(kind, len(ends), n, k, device)
        x = rows_of(rows, k, dtype)
        offsets = torch.tensor(ends, dtype=(torch.int32, torch.int64)[index % 2], device=device)
        with poisoned_memory():
            found = [
                experts_linear.experts_linear(x.to(device), offsets, *stacked(weight), config)
                for _ in range(5)
            ]
        expected = expected_rows(x, values, ends)
        beyond = found[0][ends[-1] :]
        assert torch.equal(beyond, torch.zeros_like(beyond))
        if ends[-1]:
            assert ao.sqnr(expected, found[0].cpu()) > LEAST[dtype], (ends, n, k)
        assert all(torch.equal(found[0], each) for each in found), (ends, n, k)  # no race
    equal = experts_linear.experts_linear(
        x[:68].to(device), None, *stacked(stack(kind, 4, n, k, device)[0]), config
    )
    expected = expected_rows(x[:68], stack(kind, 4, n, k, device)[1], [17, 34, 51, 68])
    assert ao.sqnr(expected, equal.cpu()) > LEAST[dtype]


@pytest.mark.parametrize("kind", ["int4", "nf4", "int8", "float8"])
def test_on_hopper_a_tile_holds_the_rows_of_most_experts(kind):
    assert experts_config(kind, 2, 2) is None  # a token: its experts have a row each
    for rows in (160, 300, 1024, 4096):
        tiles = experts_config(kind, rows, 8)
        assert isinstance(tiles, Registers) and tiles.table == (kind == "nf4")
        assert min(2 * rows / 8, 128) <= tiles.block_m <= max(4 * rows / 8, 16)
    assert experts_config(kind, 8192, 8).block_m == 256


def test_tiles_of_few_rows_hold_twice_the_mean_where_rows_are_routed(device):
    stack_, experts = stacked(stack("int4", 8, 16, 64, device)[0])
    offsets = torch.full((8,), 16, dtype=torch.int32, device=device)
    for rows, routed, alike in ((8, 1, 1), (16, 4, 2), (32, 8, 4)):
        x = torch.zeros(rows, 64, dtype=torch.bfloat16, device=device)
        assert experts_linear._config(x, offsets, stack_, experts).block_m == routed
        assert experts_linear._config(x, None, stack_, experts).block_m == alike


def test_one_launch_serves_all_experts_and_no_stack_is_decoded(device, monkeypatch):
    launched = []

    def count(name):
        kernel = getattr(experts_linear, name)

        class Counted:
            def __getitem__(self, grid):
                launched.append((name, grid))
                return kernel[grid]

        monkeypatch.setattr(experts_linear, name, Counted())

    count("few_rows_experts")
    count("many_rows_experts")
    monkeypatch.setattr(experts_linear, "dequantized", lambda *_: pytest.fail("a copy in floats"))
    weight, _ = stack("int4", 6, 32, 64, device)
    x = rows_of(6, 64, torch.bfloat16).to(device)
    experts_linear.experts_linear(x, None, *stacked(weight))
    experts_linear.experts_linear(x, torch.tensor([0, 2, 2, 6, 6, 6], device=device), *stacked(weight))
    assert [name for name, _ in launched] == ["few_rows_experts"] * 2


def test_rows_in_strides_and_a_stack_that_was_cut(device):
    weight, values = stack("int4, zero points", 4, 20, 96, device)
    cut = {name: each[:, 3:9] for name in PARTS if (each := getattr(weight, name)) is not None}
    wide = rows_of(11, 200, torch.bfloat16)
    offsets = torch.tensor([0, 2, 0, 4, 0, 9, 0, 11], device=device)[1::2]
    for x in (wide[:, 3:99], wide[:, ::2][:, :96], wide.t().contiguous().t()[:, :96]):
        parts = stacked(dataclasses.replace(weight, **cut))
        found = experts_linear.experts_linear(x.to(device), offsets, *parts)
        expected = expected_rows(x, values[:, 3:9], [2, 4, 9, 11])
        assert ao.sqnr(expected, found.cpu()) > LEAST[torch.bfloat16]


def test_what_does_not_fit_is_named(device):
    weight, _ = stack("int8", 3, 8, 32, device)
    x = torch.zeros(7, 32, dtype=torch.float16, device=device)
    with pytest.raises(RuntimeError, match=r"a multiple of 3 rows"):
        experts_linear.experts_linear(x, None, *stacked(weight))
    with pytest.raises(RuntimeError, match=r"as many offsets in int32 or int64, and were given torch.int64"):
        experts_linear.experts_linear(x, torch.tensor([1, 7], device=device), *stacked(weight))
    with pytest.raises(RuntimeError, match=r"were given torch.float32"):
        experts_linear.experts_linear(x, torch.zeros(3, device=device), *stacked(weight))
    with pytest.raises(RuntimeError, match=r"32 input features was given an input \(7, 31\)"):
        experts_linear.experts_linear(x[:, 1:], None, *stacked(weight))


def test_no_rows(device):
    weight, _ = stack("nf4", 3, 8, 32, device)
    x = torch.zeros(0, 32, dtype=torch.float16, device=device)
    assert experts_linear.experts_linear(x, None, *stacked(weight)).shape == (0, 8)
