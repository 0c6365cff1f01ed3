"""The assembly that decodes, run by numpy: every code gives the same bits as arithmetic does."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from ao_kernels.device import decode, levels, picked
from ao_kernels.device.assembly import NF4_LEVELS

DTYPES = {"BFLOAT16": torch.bfloat16, "FLOAT16": torch.float16}
CODES = np.arange(256, dtype=np.int64)


def bits(values, dtype):
    return torch.as_tensor(values).to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.int64)


def floats_of(words, dtype):
    """Pairs of 16-bit floats in words, float64 ``[..., 2]``."""
    halves = np.stack([words & 0xFFFF, words >> 16], -1).astype(np.uint16).view(np.int16)
    return torch.from_numpy(halves).view(dtype).double().numpy()


def words_of(pairs, dtype):
    """The other way round, rounded."""
    halves = bits(pairs, dtype)
    return halves[..., 0] | halves[..., 1] << 16


def permuted(a, b, selector):
    """``prmt``: eight bytes to choose from; bit 3 of a choice repeats the byte's highest bit."""
    found = 0
    for place in range(4):
        chosen = selector >> 4 * place & 15
        byte = (np.where(chosen & 4, b, a) >> 8 * (chosen & 3)) & 255
        byte = np.where(chosen & 8, (byte >> 7) * 255, byte)
        found = found | byte << 8 * place
    return found


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "add.u32": lambda a, b: a + b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mov.u32": lambda a: a,
    "setp.gt.u32": lambda a, b: a > b,
    "setp.eq.u32": lambda a, b: a == b,
    "selp.b32": lambda a, b, chosen: np.where(chosen, a, b),
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shr.s32": lambda a, b: (a ^ 0x80000000) - 0x80000000 >> b,
    "prmt.b32": permuted,
    "lop3.b32": lambda a, b, c, table: {0xEA: a & b | c, 0x6A: a & b ^ c, 0xCA: a & b | ~a & c}[int(table)],
}
FLOATS = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}


def run(assembly, operands, shared=None):
    """Registers after ``assembly``, words as int64: ``operands``, and what was written. ``shared``: words."""
    registers = {name: np.int64(word) for name, word in operands.items()}
    assembly = re.sub(r"\{([$\w]+(, [$\w]+)+)\}", lambda found: found[1].replace(", ", "+"), assembly)
    for statement in re.sub(r"[{}]", ";", assembly).split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name in (".reg", ".shared", "bar.sync"):
            continue
        target, *sources = rest.split(", ")
        if name == "ld.shared.b32":
            registers[target] = shared[registers[sources[0].strip("[]")] // 4]
            continue
        if name == "st.shared.v4.b32":
            base, offset = target.strip("[]").split("+")
            for word, each in enumerate(sources[0].split("+")):
                shared[(registers[base] + int(offset)) // 4 + word] = registers[each]
            continue
        values = [registers[each] if each in registers else np.int64(int(each, 0)) for each in sources]
        if name.startswith(("fma", "mul")):
            dtype = FLOATS[name.split(".")[-1]]
            first, second, *added = (floats_of(each, dtype) for each in values)
            product = first * second
            found = words_of(product + added[0] if added else product, dtype)
        else:
            found = INSTRUCTIONS[name](*values) & 0xFFFFFFFF
        registers[target] = found
        for half, each in enumerate(target.split("+") if "+" in target else ()):
            registers[each] = found >> 16 * half & 0xFFFF
    return registers


def bytes_as(kind, dtype):
    """Bits of what each byte stands for; e4m3's NaN is read as the number that it takes the place of."""
    codes = torch.arange(256, dtype=torch.uint8)
    if kind == "INTEGERS":
        return bits(codes.view(torch.int8), dtype)
    values = codes.view(torch.float8_e4m3fn).float()
    values[127], values[255] = 480, -480
    return bits(values, dtype)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", ["INTEGERS", "E4M3"])
def test_a_byte_a_code(kind, name):
    expected = bytes_as(kind, DTYPES[name])
    first, second = (each.reshape(-1) for each in np.meshgrid(CODES, CODES))
    word = first | second << 8 | second << 16 | first << 24
    found = run(getattr(decode, f"_{kind}_{name}").value, {"$2": word})
    for register, low, high in (("$0", first, second), ("$1", second, first)):
        assert np.array_equal(found[register] & 0xFFFF, expected[low])
        assert np.array_equal(found[register] >> 16, expected[high])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("kind", "start", "step"), [("INTEGERS", 0x100, 0x202), ("E4M3", 0x1800, 0x2220)])
def test_bytes_picked_out_of_two_words(kind, start, step, name):
    dtype = DTYPES[name]
    first, second = (each.reshape(-1) for each in np.meshgrid(CODES, CODES))
    rest = (first * 7 + second * 3 + 1) & 255
    scale = torch.tensor(0.0123).to(dtype)
    for lane in range(4):
        every = [rest] * 8
        every[2 * lane : 2 * lane + 2] = first, second
        words = [sum(each << 8 * i for i, each in enumerate(every[at : at + 4])) for at in (0, 4)]
        operands = {"$2": words[0], "$3": words[1], "$4": np.int64(start + step * lane)}
        plain = run(getattr(picked, f"_{kind}_{name}").value, operands)
        operands["$5"] = bits(scale, dtype) * np.int64(0x10001)
        scaled = run(getattr(picked, f"_SCALED_{kind}_{name}").value, operands)
        for register, codes in (("$0", first), ("$1", second)):
            expected = bytes_as(kind, dtype)
            assert np.array_equal(plain[register], expected[codes])
            product = torch.from_numpy(expected.astype(np.uint16).view(np.int16)).view(dtype) * scale
            assert np.array_equal(scaled[register], bits(product, dtype)[codes])


@pytest.mark.parametrize("name", DTYPES)
def test_four_bits_a_code(name):
    dtype, above = DTYPES[name], 128 if name == "BFLOAT16" else 1024
    levels = bits(torch.tensor(NF4_LEVELS), dtype)
    integers = bits(torch.arange(16) + above, dtype)
    word = CODES | (CODES ^ 0x5A) << 8 | (255 - CODES) << 16 | (CODES ^ 0x81) << 24
    nf4 = run(getattr(decode, f"_NF4_{name}").value, {"$4": word})
    nibbles = run(getattr(decode, f"_NIBBLES_{name}").value, {"$6": word})
    for pair, half in itertools.product(range(2), range(2)):
        byte = word >> 8 * (2 * pair + half) & 255
        for found, table in ((nf4, levels), (nibbles, integers)):
            assert np.array_equal(found[f"${pair}"] >> 16 * half & 0xFFFF, table[byte & 15])
            assert np.array_equal(found[f"${2 + pair}"] >> 16 * half & 0xFFFF, table[byte >> 4])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("copies", [16, 32])
@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_levels_in_shared_memory(warps, copies, name):
    expected = bits(torch.tensor(NF4_LEVELS), DTYPES[name])
    start = 1024
    shared = np.full(start // 4 + 256 * copies, -1)
    found = run(
        levels.FILLING.value[100 * copies + 2 * warps + (name == "FLOAT16")],
        {"%tid.x": np.arange(32 * warps), "table": np.int64(start)}, shared,
    )  # fmt: skip
    assert found["$0"] == start
    word = CODES | (CODES ^ 0x5A) << 8 | (255 - CODES) << 16 | (CODES ^ 0x81) << 24
    for copy in (0, 5, copies - 1):
        operands = {"$4": word, "level_copy": start + 4 * copy}
        found = run(levels.LOOKING_UP.value[copies], operands, shared)
        for byte, register in enumerate(("$0", "$2", "$1", "$3")):
            code = word >> 8 * byte & 255
            assert np.array_equal(found[register], expected[code & 15] | expected[code >> 4] << 16)


WORDS = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.int64)


@pytest.fixture
def whole_words():
    return pytest.importorskip("ao_kernels.device.words", reason="a Triton without Gluon")


@pytest.mark.parametrize("name", DTYPES)
def test_all_nibbles_of_a_word(name, whole_words):
    dtype = DTYPES[name]
    integers = bits(torch.arange(16) + (128 if dtype == torch.bfloat16 else 1024), dtype)
    shared = np.full(256 + 256 * 32, -1)
    table = {"%tid.x": np.arange(32), "table": np.int64(1024)}
    run(levels.FILLING.value[100 * 32 + 2 + (name == "FLOAT16")], table, shared)
    plain = run(getattr(whole_words, f"_NIBBLES_{name}").value, {"$8": WORDS})
    looked_up = run(whole_words._LOOKED_UP.value, {"$8": WORDS, "$9": np.int64(1024 + 4 * 7)}, shared)
    for place in range(8):
        code = WORDS >> 4 * place & 15
        assert np.array_equal(plain[f"${place}"], integers[code])
        assert np.array_equal(looked_up[f"${place}"], bits(torch.tensor(NF4_LEVELS), dtype)[code])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("kind", "of_byte"), [("INTEGERS", "INTEGERS"), ("FLOAT8", "E4M3")])
def test_all_bytes_of_a_word(kind, of_byte, name, whole_words):
    found = run(getattr(whole_words, f"_{kind}_{name}").value, {"$4": WORDS})
    for place in range(4):
        expected = bytes_as(of_byte, DTYPES[name])[WORDS >> 8 * place & 255]
        assert np.array_equal(found[f"${place}"], expected)
