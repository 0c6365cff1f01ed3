"""Assembly that makes floats of codes, as templates and what they are filled with: strings, no Triton.

``decode`` and ``picked`` compile them into their functions. ``{{`` and ``}}`` are braces of the assembly.
"""

from __future__ import annotations

import struct

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Source: QLoRA (arXiv:2305.14314), appendix E."""

# $0, $1: the low nibbles of bytes 0 to 3, two floats a register; $2, $3: the high ones; $4, $5: ones. $6: the
# bytes. The ones are opaque to the compiler on purpose: it would lay a constant out otherwise than the
# rest, and no longer load activations ahead of time.
NIBBLES = """{{
    .reg .b32 low, high;
    prmt.b32 low, $6, 0, 0x4140;
    prmt.b32 high, $6, 0, 0x4342;
    lop3.b32 $0, low, 0x000f000f, {exponent}, 0xea;
    lop3.b32 $1, high, 0x000f000f, {exponent}, 0xea;
    shr.u32 low, low, 4;
    shr.u32 high, high, 4;
    lop3.b32 $2, low, 0x000f000f, {exponent}, 0xea;
    lop3.b32 $3, high, 0x000f000f, {exponent}, 0xea;
    mov.b32 $4, {one};
    mov.b32 $5, {one};
}}"""

# The same outputs but the ones. A permutation of bytes looks up four codes in a table of eight; bit 3 of a
# code says which of two tables counts.
_NF4_HALF = """
    and.b32 index, $4, 0x7777;
    prmt.b32 a, {high0}, {high1}, index;
    prmt.b32 b, {high2}, {high3}, index;
    prmt.b32 c, {low0}, {low1}, index;
    prmt.b32 d, {low2}, {low3}, index;
    and.b32 index, $4, 0x8888;
    prmt.b32 index, 0x80, 0, index;
    shl.b32 index, index, 1;
    prmt.b32 index, index, 0, 0xba98;
    lop3.b32 a, index, b, a, 0xca;
    lop3.b32 c, index, d, c, 0xca;
    prmt.b32 {even}, c, a, 0x6240;
    prmt.b32 {odd}, c, a, 0x7351;
"""

# Registers a, b: bytes 0 to 3 of {word} as floats. Exponent and mantissa of two bytes move into place with
# their signs: of the lower one from a byte that repeats it, of the upper one as a shift does. The exponent's
# bias is made up for by a multiplication, which is right for subnormal numbers too.
_FLOAT8 = """
    .reg .b32 a, b, factor, zero;
    mov.b32 factor, {factor};
    mov.b32 zero, 0x80008000;
    prmt.b32 a, {word}, 0, 0x1804;
    prmt.b32 b, {word}, 0, 0x3a24;
    shr.s32 a, a, {shift};
    shr.s32 b, b, {shift};
    and.b32 a, a, {mask};
    and.b32 b, b, {mask};
    fma.rn.{dtype} a, a, factor, zero;
    fma.rn.{dtype} b, b, factor, zero;
"""

# The same decoding, and scaling: nibbles less a middle, times a scale, plus a midpoint. $0 to $3 as above;
# $4: the bytes; $5, $6: the middle, negative; $7, $8: the scale; $9, $10: the midpoint.
SCALED_NIBBLES = """{{
    .reg .b32 low, high, one;
    mov.b32 one, {one};
    prmt.b32 low, $4, 0, 0x4140;
    prmt.b32 high, $4, 0, 0x4342;
    lop3.b32 $0, low, 0x000f000f, {exponent}, 0xea;
    lop3.b32 $1, high, 0x000f000f, {exponent}, 0xea;
    shr.u32 low, low, 4;
    shr.u32 high, high, 4;
    lop3.b32 $2, low, 0x000f000f, {exponent}, 0xea;
    lop3.b32 $3, high, 0x000f000f, {exponent}, 0xea;
    fma.rn.{dtype} $0, $0, one, $5;
    fma.rn.{dtype} $1, $1, one, $6;
    fma.rn.{dtype} $2, $2, one, $5;
    fma.rn.{dtype} $3, $3, one, $6;
    fma.rn.{dtype} $0, $0, $7, $9;
    fma.rn.{dtype} $1, $1, $8, $10;
    fma.rn.{dtype} $2, $2, $7, $9;
    fma.rn.{dtype} $3, $3, $8, $10;
}}"""

# Signed bytes 0 and 2 of a register as floats, in their place. bfloat16: seven bits below an exponent make
# 128 and more, and the sign's bit in the exponent makes 128 or 256: what is too much. float16: with its
# sign's bit flipped a byte is 128 too large, and the exponent makes 1024 more.
_SIGNED_BFLOAT16 = """{{
    .reg .b32 above, minus;
    mov.b32 minus, 0xbf80bf80;
    lop3.b32 above, {pair}, 0x00800080, 0x43004300, 0xea;
    lop3.b32 {pair}, {pair}, 0x007f007f, 0x43004300, 0xea;
    fma.rn.bf16x2 {pair}, above, minus, {pair};
}}"""
_SIGNED_FLOAT16 = """{{
    .reg .b32 less, one;
    mov.b32 less, 0xe480e480;
    mov.b32 one, 0x3c003c00;
    lop3.b32 {pair}, {pair}, 0x00ff00ff, 0x64806480, 0x6a;
    fma.rn.f16x2 {pair}, {pair}, one, less;
}}"""

# $0, $1: signed bytes 0 to 3 as floats.
INTEGERS = """{{
    .reg .b32 a, b;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    {first}
    {second}
    mov.b32 $0, a;
    mov.b32 $1, b;
}}"""


def signed_asm(half: bool, pair: str) -> str:
    """Assembly that makes two floats of bytes 0 and 2 of the register ``pair``, whatever the other two."""
    return (_SIGNED_FLOAT16 if half else _SIGNED_BFLOAT16).format(pair=pair)


def float8_asm(half: bool, word: str, outputs: str) -> str:
    """Assembly that makes floats of the four e4m3 bytes of ``word``, in ``a`` and ``b``; then ``outputs``."""
    numbers = FOR_FLOAT16 if half else FOR_BFLOAT16
    return "{" + _FLOAT8.format(word=word, **numbers) + outputs + "}"


def bits_of(value: float, half: bool) -> int:
    """A float's 16 bits: float16, or bfloat16 rounded half to even."""
    if half:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    whole = float_bits(value)
    return (whole + 0x7FFF + (whole >> 16 & 1)) >> 16


def float_bits(value: float) -> int:
    """A float32's 32 bits."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _table_words(bits: list[int]) -> dict[str, str]:
    """Four words of low bytes and four of high ones."""
    words = {}
    for part in range(4):
        four = bits[4 * part : 4 * part + 4]
        words[f"low{part}"] = hex(sum((each & 255) << 8 * i for i, each in enumerate(four)))
        words[f"high{part}"] = hex(sum((each >> 8) << 8 * i for i, each in enumerate(four)))
    return words


def nf4_asm(bits: list[int], codes: str = "$4", before: str = "") -> str:
    """Assembly that looks up 16 bits for each of eight codes in the register ``codes``."""
    words = _table_words(bits)
    first = _NF4_HALF.format(**words, even="$0", odd="$2").replace("$4", codes)
    second = _NF4_HALF.format(**words, even="$1", odd="$3").replace("$4", "upper")
    declared = ".reg .b32 index, a, b, c, d, upper;"
    return f"{{ {declared} {before} {first} shr.u32 upper, {codes}, 16; {second} }}"


def level_asm(bits: list[int], code: str, out: str) -> str:
    """Assembly that looks up 16 bits for one code in a register, for the register ``out``.

    The caller declares ``index``, ``a``, ``b``, ``c``, ``d`` and the predicate ``beyond``.
    """
    words = _table_words(bits)
    return """
    setp.gt.u32 beyond, {code}, 7;
    and.b32 index, {code}, 7;
    prmt.b32 a, {high0}, {high1}, index;
    prmt.b32 b, {high2}, {high3}, index;
    prmt.b32 c, {low0}, {low1}, index;
    prmt.b32 d, {low2}, {low3}, index;
    selp.b32 a, b, a, beyond;
    selp.b32 c, d, c, beyond;
    prmt.b32 {out}, c, a, 0x0040;
    and.b32 {out}, {out}, 0xffff;
    """.format(**words, code=code, out=out)


def twice(value: float, half: bool) -> str:
    """Assembly's number for 32 bits of twice the same 16: see :func:`bits_of`."""
    return hex(bits_of(value, half) * 0x10001)


def _numbers(half: bool) -> dict[str, object]:
    """What the templates of assembly are filled with."""
    above = 1024 if half else 128
    return {
        "dtype": "f16x2" if half else "bf16x2",
        "exponent": twice(above, half),
        "one": twice(1, half),
        "first": signed_asm(half, "a"),
        "second": signed_asm(half, "b"),
        "shift": 1 if half else 4,
        "mask": "0xbf80bf80" if half else "0x87f087f0",
        "factor": twice(256 if half else 2.0**120, half),
    }


FOR_BFLOAT16, FOR_FLOAT16 = _numbers(half=False), _numbers(half=True)
NF4_BITS_BFLOAT16 = [bits_of(level, False) for level in NF4_LEVELS]
NF4_BITS_FLOAT16 = [bits_of(level, True) for level in NF4_LEVELS]
