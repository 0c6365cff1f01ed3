"""Codes decoded for the operand that Hopper's tensor cores take from registers.

Of two 4-bit codes to a byte a thread holds every fourth byte, of a code to a byte two of each eight. It is
given whole words, which the threads beside it share, and picks its bytes. Compiled only: never interpreted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ao_kernels.device.assembly import (
    FOR_BFLOAT16,
    FOR_FLOAT16,
    NF4_BITS_BFLOAT16,
    NF4_BITS_FLOAT16,
    nf4_asm,
    signed_asm,
)
from ao_kernels.device.decode import INT8

# One byte out of a word: $0, $1 its low and its high four bits, less a middle, scaled, and a midpoint added.
# $2: the word; $3: which byte, as a permutation; $4: the middle, negative, twice; $5: the scale and $6: the
# midpoint, twice.
_NIBBLES = """{{
    .reg .b32 pair, one;
    mov.b32 one, {one};
    prmt.b32 pair, $2, 0, $3;
    mul.lo.u32 pair, pair, 0x1001;
    lop3.b32 pair, pair, 0x000f000f, {exponent}, 0xea;
    fma.rn.{dtype} pair, pair, one, $4;
    fma.rn.{dtype} pair, pair, $5, $6;
    mov.b32 {{$0, $1}}, pair;
}}"""

# Two neighbouring bytes out of two words: $0, $1; $2, $3: the words; $4: which bytes, as a permutation.
_INTEGERS = """{{
    .reg .b32 both;
    prmt.b32 both, $2, $3, $4;
    {both}
    {scaling}
    mov.b32 {{$0, $1}}, both;
}}"""
_FLOAT8 = """{{
    .reg .b32 both, factor, zero;
    mov.b32 factor, {factor};
    mov.b32 zero, 0x80008000;
    prmt.b32 both, $2, $3, $4;
    shr.s32 both, both, {shift};
    and.b32 both, both, {mask};
    fma.rn.{dtype} both, both, factor, zero;
    {scaling}
    mov.b32 {{$0, $1}}, both;
}}"""


def _bytes_asm(template: str, half: bool, scaled: bool) -> tl.constexpr:
    """With ``scaled``, ``$5`` is the scale, twice."""
    numbers = FOR_FLOAT16 if half else FOR_BFLOAT16
    scaling = f"mul.rn.{numbers['dtype']} both, both, $5;" if scaled else ""
    return tl.constexpr(template.format(**numbers, both=signed_asm(half, "both"), scaling=scaling))


# One byte out of a word: $0, $1 the levels of its low and its high four bits, looked up and scaled. $2: the
# word; $3: which byte, as a permutation; $4: the lane's copy of the table; $5: the scale, twice.
_LOOKED_UP = """{{
    .reg .b32 pair;
    prmt.b32 pair, $2, 0, $3;
    mad.lo.u32 pair, pair, {bytes}, $4;
    ld.shared.b32 pair, [pair];
    mul.rn.{dtype} pair, pair, $5;
    mov.b32 {{$0, $1}}, pair;
}}"""

_PICKING = (
    ".reg .b32 bytes, rest; prmt.b32 bytes, $4, $5, $8; prmt.b32 rest, $6, $7, $8; "
    "prmt.b32 bytes, bytes, rest, 0x5410;"
)
"""A byte out of each of four words, ``$4`` to ``$7``; ``$8`` to ``$11``, the same, say which."""
_NIBBLES_BFLOAT16 = tl.constexpr(_NIBBLES.format(**FOR_BFLOAT16))
_NIBBLES_FLOAT16 = tl.constexpr(_NIBBLES.format(**FOR_FLOAT16))
_INTEGERS_BFLOAT16 = _bytes_asm(_INTEGERS, half=False, scaled=False)
_INTEGERS_FLOAT16 = _bytes_asm(_INTEGERS, half=True, scaled=False)
_E4M3_BFLOAT16 = _bytes_asm(_FLOAT8, half=False, scaled=False)
_E4M3_FLOAT16 = _bytes_asm(_FLOAT8, half=True, scaled=False)
_SCALED_INTEGERS_BFLOAT16 = _bytes_asm(_INTEGERS, half=False, scaled=True)
_SCALED_INTEGERS_FLOAT16 = _bytes_asm(_INTEGERS, half=True, scaled=True)
_SCALED_E4M3_BFLOAT16 = _bytes_asm(_FLOAT8, half=False, scaled=True)
_SCALED_E4M3_FLOAT16 = _bytes_asm(_FLOAT8, half=True, scaled=True)
_NF4_BFLOAT16 = tl.constexpr(nf4_asm(NF4_BITS_BFLOAT16, "bytes", _PICKING))
_NF4_FLOAT16 = tl.constexpr(nf4_asm(NF4_BITS_FLOAT16, "bytes", _PICKING))
_LOOKED_UP_BFLOAT16 = tl.constexpr(_LOOKED_UP.format(**FOR_BFLOAT16, bytes=4 * 32))
_LOOKED_UP_FLOAT16 = tl.constexpr(_LOOKED_UP.format(**FOR_FLOAT16, bytes=4 * 32))
_NF4_REGISTERS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 8))


@triton.jit
def _twice_in_a_word(value, DTYPE: tl.constexpr):
    """Both halves of 32 bits: ``value`` in ``DTYPE``."""
    bits = value.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    return bits | (bits << 16)


@triton.jit
def picked_nibbles(words, lane, less, scale, midpoint, DTYPE: tl.constexpr):
    """``(nibble + 128 + less) * scale + midpoint`` of byte ``lane`` of words: of its low and its high half.

    With float16 1024 for 128; all are broadcast.
    """
    ASSEMBLY: tl.constexpr = _NIBBLES_BFLOAT16 if DTYPE == tl.bfloat16 else _NIBBLES_FLOAT16
    chosen = 0x4440 + lane
    less = _twice_in_a_word(less, DTYPE)
    factor = _twice_in_a_word(scale, DTYPE)
    shift = _twice_in_a_word(midpoint, DTYPE)
    low, high = tl.inline_asm_elementwise(
        ASSEMBLY, "=h,=h,r,r,r,r,r", [words, chosen, less, factor, shift], (tl.uint16, tl.uint16),
        is_pure=True, pack=1,
    )  # fmt: skip
    return low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)


@triton.jit
def picked_levels(words, lane, scale, DTYPE: tl.constexpr):
    """The NF4 levels, scaled, of byte ``lane`` of words: of its low and its high half."""
    ASSEMBLY: tl.constexpr = _NF4_BFLOAT16 if DTYPE == tl.bfloat16 else _NF4_FLOAT16
    chosen = 0x0040 + 0x11 * lane
    low, high = tl.inline_asm_elementwise(
        ASSEMBLY, _NF4_REGISTERS, [words, chosen], (tl.uint16, tl.uint16), is_pure=True, pack=4
    )
    factor = scale.to(DTYPE)
    return low.to(DTYPE, bitcast=True) * factor, high.to(DTYPE, bitcast=True) * factor


@triton.jit
def looked_up_levels(words, lane, scale, copy, DTYPE: tl.constexpr):
    """The same by a table of 32 copies in shared memory; ``copy``: the lane's, as of ``levels.lane_copy``."""
    ASSEMBLY: tl.constexpr = _LOOKED_UP_BFLOAT16 if DTYPE == tl.bfloat16 else _LOOKED_UP_FLOAT16
    chosen = 0x4440 + lane
    factor = _twice_in_a_word(scale, DTYPE)
    low, high = tl.inline_asm_elementwise(
        ASSEMBLY, "=h,=h,r,r,r,r", [words, chosen, copy, factor], (tl.uint16, tl.uint16),
        is_pure=True, pack=1,
    )  # fmt: skip
    return low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)


@triton.jit
def picked_bytes(first, second, lane, scale, KIND: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    """Signed bytes or float8 e4m3: bytes ``2 * lane`` and the next of two words, scaled if ``SCALED``."""
    BFLOAT16: tl.constexpr = DTYPE == tl.bfloat16
    if KIND == INT8:  # to bytes 0 and 2
        chosen = 0x0100 + 0x0202 * lane
    else:  # to bytes 1 and 3, and the sign of the first to all bits of byte 2
        chosen = 0x1800 + 0x2220 * lane
    if SCALED:
        IN_BFLOAT16: tl.constexpr = _SCALED_INTEGERS_BFLOAT16 if KIND == INT8 else _SCALED_E4M3_BFLOAT16
        IN_FLOAT16: tl.constexpr = _SCALED_INTEGERS_FLOAT16 if KIND == INT8 else _SCALED_E4M3_FLOAT16
        even, odd = tl.inline_asm_elementwise(
            IN_BFLOAT16 if BFLOAT16 else IN_FLOAT16, "=h,=h,r,r,r,r",
            [first, second, chosen, _twice_in_a_word(scale, DTYPE)], (tl.uint16, tl.uint16),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        IN_BFLOAT16: tl.constexpr = _INTEGERS_BFLOAT16 if KIND == INT8 else _E4M3_BFLOAT16
        IN_FLOAT16: tl.constexpr = _INTEGERS_FLOAT16 if KIND == INT8 else _E4M3_FLOAT16
        even, odd = tl.inline_asm_elementwise(
            IN_BFLOAT16 if BFLOAT16 else IN_FLOAT16, "=h,=h,r,r,r", [first, second, chosen],
            (tl.uint16, tl.uint16), is_pure=True, pack=1,
        )  # fmt: skip
    return even.to(DTYPE, bitcast=True), odd.to(DTYPE, bitcast=True)
