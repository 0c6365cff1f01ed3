"""Reading the scales of groups inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_scales(
    scale_ptrs, zero_ptrs, offset_ptrs, step_ptrs, byte, groups, scaler_size,
    ZERO: tl.constexpr, CODED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What is stored for the group of each row's ``byte``: scale, zero, offset, step; unused ones are scales.

    Args:
        scale_ptrs: of each row's first group; so the others.
        byte: of the codes of a row.
        ZERO: 0 none, 1 midpoints (added), 2 zero points (instead of 8).
        CODED: 0; or scales are bytes, which stand for ``(offset + code * step) ** 4``: 1 with an offset and a
            step for the row, 2 with one of each for every ``scaler_size`` groups.
        GROUP: bytes to a scale; 0: one for the row.
    """
    group = byte * 0
    if GROUP > 0:
        group = tl.minimum(byte // GROUP, groups - 1)
    scale = tl.load(scale_ptrs + group)
    zero = scale
    offset = scale
    step = scale
    if ZERO > 0:
        zero = tl.load(zero_ptrs + group)
    if CODED == 1:
        offset = tl.load(offset_ptrs + group * 0)
        step = tl.load(step_ptrs + group * 0)
    elif CODED == 2:
        offset = tl.load(offset_ptrs + group // scaler_size)
        step = tl.load(step_ptrs + group // scaler_size)
    return scale, zero, offset, step


@triton.jit
def load_row_scales(
    scale_ptr, zero_ptr, offset_ptr, step_ptr, rows, byte, groups, scalers, scaler_size,
    ZERO: tl.constexpr, CODED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """:func:`load_scales` of ``rows``; ``scalers``: offsets and steps of a row."""
    first, first_scaler = rows * groups, rows * scalers
    return load_scales(
        scale_ptr + first, zero_ptr + first, offset_ptr + first_scaler, step_ptr + first_scaler,
        byte, groups, scaler_size, ZERO, CODED, GROUP,
    )  # fmt: skip


@triton.jit
def scale_of(raw, CODED: tl.constexpr):
    """The scale in float32."""
    scale = raw[0].to(tl.float32)
    if CODED:
        scale = raw[2] + scale * raw[3]
        scale = scale * scale
        scale = scale * scale
    return scale
