"""Codes to floats inside Triton kernels, four bytes at a time.

A 16-bit float whose exponent is fixed counts its mantissa in steps of one: bfloat16 from 128 on, float16 from
1024 on. So ``code | exponent`` is a float without a conversion, which Hopper does slowly: one instruction
makes two of them. What is too much, :func:`above`, is taken off where that costs least, by the caller.

Triton's interpreter knows no assembly: there the same values are computed by plain arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ao_kernels.device.assembly import (
    FOR_BFLOAT16,
    FOR_FLOAT16,
    INTEGERS,
    NF4_BITS_BFLOAT16,
    NF4_BITS_FLOAT16,
    NF4_LEVELS,
    NIBBLES,
    SCALED_NIBBLES,
    float8_asm,
    float_bits,
    nf4_asm,
)

INT4, NF4, INT8, FLOAT8 = (tl.constexpr(kind) for kind in range(4))

_NIBBLES_BFLOAT16 = tl.constexpr(NIBBLES.format(**FOR_BFLOAT16))
_NIBBLES_FLOAT16 = tl.constexpr(NIBBLES.format(**FOR_FLOAT16))
_NF4_BFLOAT16 = tl.constexpr(nf4_asm(NF4_BITS_BFLOAT16))
_NF4_FLOAT16 = tl.constexpr(nf4_asm(NF4_BITS_FLOAT16))
_NF4_UPPER = tl.constexpr(nf4_asm([float_bits(level) >> 16 for level in NF4_LEVELS]))
_NF4_LOWER = tl.constexpr(nf4_asm([float_bits(level) & 0xFFFF for level in NF4_LEVELS]))
_SCALED_BFLOAT16 = tl.constexpr(SCALED_NIBBLES.format(**FOR_BFLOAT16))
_SCALED_FLOAT16 = tl.constexpr(SCALED_NIBBLES.format(**FOR_FLOAT16))
_INTEGERS_BFLOAT16 = tl.constexpr(INTEGERS.format(**FOR_BFLOAT16))
_INTEGERS_FLOAT16 = tl.constexpr(INTEGERS.format(**FOR_FLOAT16))
_E4M3_BFLOAT16, _E4M3_FLOAT16 = (
    tl.constexpr(float8_asm(half, "$2", "mov.b32 $0, a; mov.b32 $1, b;")) for half in (False, True)
)


@triton.jit
def nibbles(codes, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """The low and the high four bits of bytes, each plus :func:`above`, and ones of the same shape."""
    if INTERPRET:
        more: tl.constexpr = 128.0 if DTYPE == tl.bfloat16 else 1024.0
        low = ((codes & 15).to(tl.float32) + more).to(DTYPE)
        high = ((codes >> 4).to(tl.float32) + more).to(DTYPE)
        ones = tl.full(codes.shape, 1.0, DTYPE)
    elif DTYPE == tl.bfloat16:
        low, high, ones = tl.inline_asm_elementwise(
            _NIBBLES_BFLOAT16,
            "=r,=r,=r,=r,=r,=r,r",
            [codes],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low, high, ones = tl.inline_asm_elementwise(
            _NIBBLES_FLOAT16,
            "=r,=r,=r,=r,=r,=r,r",
            [codes],
            (tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    return low, high, ones


@triton.jit
def scaled_nibbles(codes, middle, scale, midpoint, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """``(nibble - middle) * scale + midpoint`` of the low and of the high four bits of bytes, in ``DTYPE``.

    ``middle`` float32; the three are broadcast. Whole middles are taken off exactly; the rest is rounded
    once.
    """
    less = (-above(DTYPE) - middle).to(DTYPE)
    factor = scale.to(DTYPE)
    shift = midpoint.to(DTYPE)
    if INTERPRET:
        low = (codes & 15).to(tl.float32) - middle
        high = (codes >> 4).to(tl.float32) - middle
        low = (low * factor.to(tl.float32) + shift.to(tl.float32)).to(DTYPE)
        high = (high * factor.to(tl.float32) + shift.to(tl.float32)).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _SCALED_BFLOAT16, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r", [codes, less, factor, shift],
            (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = tl.inline_asm_elementwise(
            _SCALED_FLOAT16, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r", [codes, less, factor, shift],
            (tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    return low, high


@triton.jit
def integers(codes, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Signed bytes (read as unsigned ones) as 16-bit floats, exact."""
    if INTERPRET:
        values = codes.to(tl.int8, bitcast=True).to(tl.float32).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        values = tl.inline_asm_elementwise(
            _INTEGERS_BFLOAT16, "=r,=r,r", [codes], tl.bfloat16, is_pure=True, pack=4
        )
    else:
        values = tl.inline_asm_elementwise(
            _INTEGERS_FLOAT16, "=r,=r,r", [codes], tl.float16, is_pure=True, pack=4
        )
    return values


@triton.jit
def nf4_levels(codes, table, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """The NF4 levels of the low and of the high four bits of bytes. ``table``: 16 floats, if interpreted.

    In float32 they are exact, and looked up half by half.
    """
    if INTERPRET:
        low = tl.load(table + (codes & 15)).to(DTYPE)
        high = tl.load(table + (codes >> 4)).to(DTYPE)
    elif DTYPE == tl.float32:
        low_upper, high_upper = tl.inline_asm_elementwise(
            _NF4_UPPER, "=r,=r,=r,=r,r", [codes], (tl.uint16, tl.uint16), is_pure=True, pack=4
        )
        low_lower, high_lower = tl.inline_asm_elementwise(
            _NF4_LOWER, "=r,=r,=r,=r,r", [codes], (tl.uint16, tl.uint16), is_pure=True, pack=4
        )
        low = ((low_upper.to(tl.uint32) << 16) | low_lower.to(tl.uint32)).to(tl.float32, bitcast=True)
        high = ((high_upper.to(tl.uint32) << 16) | high_lower.to(tl.uint32)).to(tl.float32, bitcast=True)
    elif DTYPE == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _NF4_BFLOAT16, "=r,=r,=r,=r,r", [codes], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low, high = tl.inline_asm_elementwise(
            _NF4_FLOAT16, "=r,=r,=r,=r,r", [codes], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def float8_values(codes, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Bytes that are float8 e4m3 as 16-bit floats, exact."""
    if INTERPRET:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        values = tl.inline_asm_elementwise(
            _E4M3_BFLOAT16, "=r,=r,r", [codes], tl.bfloat16, is_pure=True, pack=4
        )
    else:
        values = tl.inline_asm_elementwise(
            _E4M3_FLOAT16, "=r,=r,r", [codes], tl.float16, is_pure=True, pack=4
        )
    return values


@triton.jit
def above(DTYPE: tl.constexpr):
    """How much :func:`nibbles` are above the codes."""
    return 128.0 if DTYPE == tl.bfloat16 else 1024.0


@triton.jit
def dot(a, b, INTERPRET: tl.constexpr):
    """``tl.dot`` of 16-bit floats. The interpreter multiplies the bits of bfloat16, not the numbers."""
    if INTERPRET:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b)
    return product


@triton.jit
def times(values, scale, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Rows of 16-bit floats times a scale each, float32 ``[N]``; it and the product become ``DTYPE``."""
    factor = scale.to(DTYPE)[:, None]
    if INTERPRET:
        product = (values.to(tl.float32) * factor.to(tl.float32)).to(DTYPE)
    else:
        product = values * factor
    return product
