"""GPTQ's column loop over a span of columns, in one launch.

Rows do not depend on each other: a program has some of them, and goes over the columns in order. It keeps
the errors of the columns behind it in registers. A column is read once, and what the errors behind it owe to
it is one product with a column of the factor: one sum a column, and nothing is written but results.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: added and taken off again, it rounds half to even


@triton.jit
def gptq_columns(
    w_ptr, upper_ptr, table_ptr, groups_ptr, steps_ptr, errors_ptr, N, C, G,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``w [B, N, C]``, ``upper [B, C, C]``, ``table [B, N, G, WIDTH]``; ``WIDTH`` 2: even levels."""
    stack = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    row = stack * N + tl.minimum(n, N - 1)
    c = tl.arange(0, BLOCK_C)
    upper_ptr += stack * C * C
    errors = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i in tl.range(0, C):
        owed = tl.load(upper_ptr + c * C + i, mask=c < i, other=0.0)
        value = tl.load(w_ptr + row * C + i) - tl.sum(errors * owed[None, :], axis=1)
        group = tl.load(groups_ptr + stack * C + i)
        table = table_ptr + (row * G + group) * WIDTH
        lowest = tl.load(table)
        if WIDTH == 2:
            distance = tl.load(table + 1)
            step = tl.minimum(tl.maximum((value - lowest) / distance, 0.0), LEVELS - 1.0)
            step = (step + _NEAREST) - _NEAREST
            level = lowest + step * distance
        else:
            step = tl.zeros((BLOCK_N,), tl.float32)
            level = lowest
            before = lowest
            for number in tl.static_range(1, WIDTH):
                after = tl.load(table + number)
                above = value > (before + after) / 2
                step = tl.where(above, number * 1.0, step)
                level = tl.where(above, after, level)
                before = after
        error = (value - level) / tl.load(upper_ptr + i * C + i)
        errors = tl.where((c == i)[None, :], error[:, None], errors)
        tl.store(steps_ptr + row * C + i, step.to(tl.uint8), mask=inside)
    places = row[:, None] * C + c[None, :]
    tl.store(errors_ptr + places, errors, mask=inside[:, None] & (c < C)[None, :])
