"""Codes in shared memory as the operand that Hopper's tensor cores take from registers.

A thread of the operand holds, of each row, every fourth byte of two codes, or of each eight bytes two. It
reads whole words instead, as do the three beside it, at no cost, and picks its byte from each: no order of
columns has to be changed, neither of codes nor of activations.

Written in Gluon, as :mod:`ao_kernels.device.from_registers`, which it serves.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ao_kernels.device.decode import INT4, NF4, above
from ao_kernels.device.picked import looked_up_levels, picked_bytes, picked_levels, picked_nibbles
from ao_kernels.device.scales import scale_of


@gluon.jit
def _spread(scales, LAYOUT: gl.constexpr):
    """One of two or four scales ``[64, 2 or 4]`` for each of the eight parts of a step."""
    if scales.shape[1] == 2:
        twice = gl.join(scales, scales)
        scales = gl.join(twice, twice).reshape([64, 8])
    elif scales.shape[1] == 4:
        scales = gl.join(scales, scales).reshape([64, 8])
    EACH: gl.constexpr = scales.shape[1]
    return scales if EACH == 1 else gl.convert_layout(scales, gl.SliceLayout(2, LAYOUT), assert_trivial=True)


@gluon.jit
def operand(
    words, raw, copy, WIDE: gl.constexpr, LAYOUT: gl.constexpr, TARGET: gl.constexpr,
    KIND: gl.constexpr, ZERO: gl.constexpr, CODED: gl.constexpr, GROUP: gl.constexpr, DTYPE: gl.constexpr,
    TABLE: gl.constexpr,
):  # fmt: skip
    """Words of codes ``[64, W]`` in shared memory as the left operand ``[64, 64]``.

    Scaled, unless :func:`ao_kernels.device.from_registers.from_registers` does that at the end.
    """
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
    lane = gl.expand_dims(gl.expand_dims(lane, 0), 0)
    scale = _spread(scale_of(raw, CODED), LAYOUT)
    SCALED: gl.constexpr = GROUP > 0 or CODED or (KIND == INT4 and ZERO == 1)
    if not SCALED:
        scale = gl.full_like(scale, 1.0)
    scale = gl.expand_dims(scale, 2)
    codes = words.load(WIDE)
    if KIND == INT4:
        middle = gl.full_like(scale, 8.0)
        midpoint = gl.zeros_like(scale)
        if ZERO == 1:
            midpoint = gl.expand_dims(_spread(raw[1].to(gl.float32), LAYOUT), 2)
        elif ZERO == 2:
            middle = gl.expand_dims(_spread(raw[1].to(gl.float32), LAYOUT), 2)
        less = (-above(DTYPE) - middle).to(DTYPE)
        even, odd = picked_nibbles(gl.expand_dims(codes, 2), lane, less, scale, midpoint, DTYPE)
    elif TABLE:
        even, odd = looked_up_levels(gl.expand_dims(codes, 2), lane, scale, copy, DTYPE)
    elif KIND == NF4:
        even, odd = picked_levels(gl.expand_dims(codes, 2), lane, scale, DTYPE)
    else:
        PAIRS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
        first, second = gl.split(codes.reshape([64, words.shape[1] // 2, 2]))
        first = gl.expand_dims(gl.convert_layout(first, PAIRS, assert_trivial=True), 2)
        second = gl.expand_dims(gl.convert_layout(second, PAIRS, assert_trivial=True), 2)
        even, odd = picked_bytes(first, second, lane, scale, KIND, DTYPE, SCALED)
    return gl.convert_layout(gl.join(even, odd).reshape([64, 64]), TARGET, assert_trivial=True)
