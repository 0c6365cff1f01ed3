"""Codes decoded for the operand that Hopper's tensor cores take from registers.

Of two 4-bit codes to a byte a thread holds every fourth byte, of a code to a byte two of each eight. It is
given whole words, which the threads beside it share, and picks its bytes. Compiled only: never interpreted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ao_kernels.device.decode import (
    FOR_BFLOAT16,
    FOR_FLOAT16,
    INT8,
    NF4_BITS_BFLOAT16,
    NF4_BITS_FLOAT16,
    nf4_asm,
)

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

# Two neighbouring bytes out of two words: $0, $1; $2, $3: the words; $4: which bytes; $5: the scale, twice.
_INTEGERS = """{{
    .reg .b32 both, low, high, one, sixteen, less_high, less_low;
    mov.b32 one, {one};
    mov.b32 sixteen, {sixteen};
    mov.b32 less_high, {less_high};
    mov.b32 less_low, {less_low};
    prmt.b32 both, $2, $3, $4;
    xor.b32 both, both, 0x8080;
    prmt.b32 both, both, 0, 0x4140;
    lop3.b32 low, both, 0x000f000f, {exponent}, 0xea;
    shr.u32 both, both, 4;
    lop3.b32 high, both, 0x000f000f, {exponent}, 0xea;
    fma.rn.{dtype} low, low, one, less_low;
    fma.rn.{dtype} high, high, sixteen, less_high;
    fma.rn.{dtype} low, high, one, low;
    mul.rn.{dtype} low, low, $5;
    mov.b32 {{$0, $1}}, low;
}}"""
_FLOAT8 = """{{
    .reg .b32 both, sign, factor, zero;
    prmt.b32 both, $2, $3, $4;
    prmt.b32 both, both, 0, 0x1404;
    and.b32 sign, both, 0x80008000;
    shr.u32 both, both, {shift};
    lop3.b32 both, both, {mask}, sign, 0xea;
    mov.b32 factor, {factor};
    mov.b32 zero, 0x80008000;
    fma.rn.{dtype} both, both, factor, zero;
    mul.rn.{dtype} both, both, $5;
    mov.b32 {{$0, $1}}, both;
}}"""

_PICKING = (
    ".reg .b32 bytes, rest; prmt.b32 bytes, $4, $5, $8; prmt.b32 rest, $6, $7, $8; "
    "prmt.b32 bytes, bytes, rest, 0x5410;"
)
"""A byte out of each of four words, ``$4`` to ``$7``; ``$8`` to ``$11``, the same, say which."""
_NIBBLES_BFLOAT16 = tl.constexpr(_NIBBLES.format(**FOR_BFLOAT16))
_NIBBLES_FLOAT16 = tl.constexpr(_NIBBLES.format(**FOR_FLOAT16))
_INTEGERS_BFLOAT16 = tl.constexpr(_INTEGERS.format(**FOR_BFLOAT16))
_INTEGERS_FLOAT16 = tl.constexpr(_INTEGERS.format(**FOR_FLOAT16))
_E4M3_BFLOAT16 = tl.constexpr(_FLOAT8.format(**FOR_BFLOAT16))
_E4M3_FLOAT16 = tl.constexpr(_FLOAT8.format(**FOR_FLOAT16))
_NF4_BFLOAT16 = tl.constexpr(nf4_asm(NF4_BITS_BFLOAT16, "bytes", _PICKING))
_NF4_FLOAT16 = tl.constexpr(nf4_asm(NF4_BITS_FLOAT16, "bytes", _PICKING))
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
def picked_bytes(first, second, lane, scale, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Signed bytes or float8 e4m3, scaled: bytes ``2 * lane`` and the next of two words."""
    IN_BFLOAT16: tl.constexpr = _INTEGERS_BFLOAT16 if KIND == INT8 else _E4M3_BFLOAT16
    IN_FLOAT16: tl.constexpr = _INTEGERS_FLOAT16 if KIND == INT8 else _E4M3_FLOAT16
    ASSEMBLY: tl.constexpr = IN_BFLOAT16 if DTYPE == tl.bfloat16 else IN_FLOAT16
    chosen = 0x10 + 0x22 * lane
    factor = _twice_in_a_word(scale, DTYPE)
    even, odd = tl.inline_asm_elementwise(
        ASSEMBLY, "=h,=h,r,r,r,r", [first, second, chosen, factor], (tl.uint16, tl.uint16),
        is_pure=True, pack=1,
    )  # fmt: skip
    return even.to(DTYPE, bitcast=True), odd.to(DTYPE, bitcast=True)
