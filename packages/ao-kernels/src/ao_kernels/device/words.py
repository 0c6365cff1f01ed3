"""Whole words of codes as the right operand of a warp's matrix instructions, and activations to go with them.

A thread of the operand holds pairs of rows of K for one column of the output. It is given words of codes
that lie beside each other, and so most of its weight in one load. Which of its codes make a pair depends on
how they are decoded, and the columns of K of a product may come in any order: activations, which a thread
holds in runs as long, are put in the same one. For that registers are renamed, and nothing moves between
threads.

Written in Gluon: compiled only, never interpreted.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ao_kernels.device.assembly import FOR_BFLOAT16, FOR_FLOAT16, float8_asm, signed_asm
from ao_kernels.device.decode import INT4, INT8, NF4
from ao_kernels.device.levels import looking_up_asm

# $0 to $7: the codes of the word $8, from the lowest, plus 128 (1024 with float16). Codes 0 and 4 share a
# register, 1 and 5, 2 and 6, 3 and 7.
_NIBBLES = """{{
    .reg .b32 a, b, c, d, rest;
    lop3.b32 a, $8, 0x000f000f, {exponent}, 0xea;
    shr.u32 rest, $8, 4;
    lop3.b32 b, rest, 0x000f000f, {exponent}, 0xea;
    shr.u32 rest, $8, 8;
    lop3.b32 c, rest, 0x000f000f, {exponent}, 0xea;
    shr.u32 rest, $8, 12;
    lop3.b32 d, rest, 0x000f000f, {exponent}, 0xea;
    mov.b32 {{$0, $4}}, a;
    mov.b32 {{$1, $5}}, b;
    mov.b32 {{$2, $6}}, c;
    mov.b32 {{$3, $7}}, d;
}}"""

# $0 to $3: the signed bytes of the word $4. Bytes 0 and 2 share a register, and 1 and 3.
_INTEGERS = """{{
    .reg .b32 a, b;
    mov.b32 a, $4;
    shr.u32 b, $4, 8;
    {first}
    {second}
    mov.b32 {{$0, $2}}, a;
    mov.b32 {{$1, $3}}, b;
}}"""

# Where the levels of the word $8 go ($9: the lane's copy of the table), and the floats of float8's bytes, $4:
# neighbours share a register.
_LEVELS = "mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;"
_FLOAT8 = "mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b;"

_NIBBLES_BFLOAT16 = tl.constexpr(_NIBBLES.format(**FOR_BFLOAT16))
_NIBBLES_FLOAT16 = tl.constexpr(_NIBBLES.format(**FOR_FLOAT16))
_LOOKED_UP = tl.constexpr(looking_up_asm("$8", "$9", 32, _LEVELS))
_INTEGERS_BFLOAT16 = tl.constexpr(
    _INTEGERS.format(first=signed_asm(False, "a"), second=signed_asm(False, "b"))
)
_INTEGERS_FLOAT16 = tl.constexpr(_INTEGERS.format(first=signed_asm(True, "a"), second=signed_asm(True, "b")))
_FLOAT8_BFLOAT16, _FLOAT8_FLOAT16 = (tl.constexpr(float8_asm(half, "$4", _FLOAT8)) for half in (False, True))


@gluon.constexpr_function
def bits(start, end, dim, rank):
    """Bases of a linear layout: along ``dim``, from ``start``, twice as far each, before ``end``."""
    bases = []
    while start < end:
        bases.append([start if each == dim else 0 for each in range(rank)])
        start *= 2
    return bases


@gluon.constexpr_function
def runs(rows, parts, columns, apart):
    """Layout of ``[rows, parts * columns]``: a part to a warp, a run of columns to each four lanes.

    Args:
        rows: eight or more.
        parts: of the columns.
        columns: of a part.
        apart: where lanes four apart are in eight rows: ``(1, 2, 4)`` for neighbours.
    """
    own = columns // 4
    return gl.DistributedLinearLayout(
        bits(1, own, 1, 2) + bits(8, rows, 0, 2),
        [[0, own], [0, 2 * own], *([row, 0] for row in apart)],
        bits(columns, parts * columns, 1, 2), [], [rows, parts * columns],
    )  # fmt: skip


@gluon.jit
def right_operand(
    words, copy, KIND: gl.constexpr, DTYPE: gl.constexpr, PARTS: gl.constexpr, TARGET: gl.constexpr
):
    """Words of codes ``[N, PARTS * W]`` as ``[PARTS, columns of K, N]``.

    The output's columns are in the order of :func:`column_of`.

    Args:
        words: in the layout ``runs(N, PARTS, W, (4, 2, 1))``.
        copy: NF4 alone: the lane's copy of the table, as of :func:`ao_kernels.device.levels.lane_copy`.
        TARGET: the operand's layout.
    """
    N: gl.constexpr = words.shape[0]
    OWN: gl.constexpr = words.shape[1] // PARTS // 4
    BFLOAT16: gl.constexpr = DTYPE == gl.bfloat16
    if KIND == INT4 or KIND == NF4:
        if KIND == INT4:
            NIBBLES: gl.constexpr = _NIBBLES_BFLOAT16 if BFLOAT16 else _NIBBLES_FLOAT16
            a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
                NIBBLES, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words],
                (gl.uint16, gl.uint16, gl.uint16, gl.uint16, gl.uint16, gl.uint16, gl.uint16, gl.uint16),
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
                _LOOKED_UP, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, copy],
                (gl.uint16, gl.uint16, gl.uint16, gl.uint16, gl.uint16, gl.uint16, gl.uint16, gl.uint16),
                is_pure=True, pack=1,
            )  # fmt: skip
        low = gl.join(gl.join(a, b), gl.join(c, d))
        values = gl.join(low, gl.join(gl.join(e, f), gl.join(g, h)))
        # A row's place in its eight, highest bit first; part, lane, word; the code's place, lowest bit first.
        values = values.reshape([N // 8, 2, 2, 2, PARTS, 4, OWN, 2, 2, 2])
        if KIND == INT4:
            values = values.permute((4, 6, 8, 7, 5, 9, 0, 3, 2, 1))
        else:
            values = values.permute((4, 6, 9, 8, 5, 7, 0, 3, 2, 1))
        values = values.reshape([PARTS, 32 * OWN, N])
    else:
        if KIND == INT8:
            BYTES: gl.constexpr = _INTEGERS_BFLOAT16 if BFLOAT16 else _INTEGERS_FLOAT16
        else:
            BYTES: gl.constexpr = _FLOAT8_BFLOAT16 if BFLOAT16 else _FLOAT8_FLOAT16
        a, b, c, d = gl.inline_asm_elementwise(
            BYTES,
            "=h,=h,=h,=h,r",
            [words],
            (gl.uint16, gl.uint16, gl.uint16, gl.uint16),
            is_pure=True,
            pack=1,
        )
        values = gl.join(gl.join(a, b), gl.join(c, d)).reshape([N // 8, 2, 2, 2, PARTS, 4, OWN, 2, 2])
        if KIND == INT8:
            values = values.permute((4, 6, 7, 5, 8, 0, 3, 2, 1))
        else:
            values = values.permute((4, 6, 8, 5, 7, 0, 3, 2, 1))
        values = values.reshape([PARTS, 16 * OWN, N])
    return gl.convert_layout(values.to(DTYPE, bitcast=True), TARGET, assert_trivial=True)


@gluon.jit
def left_operand(x, KIND: gl.constexpr, PARTS: gl.constexpr, TARGET: gl.constexpr):
    """Activations ``[M, PARTS * columns]`` as ``[PARTS, M, columns]``, in the order of :func:`right_operand`.

    Args:
        x: in the layout ``runs(M, PARTS, columns, (1, 2, 4))``.
        TARGET: the operand's layout.
    """
    M: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1] // PARTS
    if KIND == INT4 or KIND == NF4:
        x = x.reshape([M, PARTS, 4, COLUMNS // 32, 2, 2, 2])
        x = x.permute((1, 0, 3, 5, 6, 2, 4)) if KIND == INT4 else x.permute((1, 0, 3, 4, 5, 2, 6))
    else:
        x = x.reshape([M, PARTS, 4, COLUMNS // 16, 2, 2])
        x = x.permute((1, 0, 3, 5, 2, 4)) if KIND == INT8 else x.permute((1, 0, 3, 4, 2, 5))
    return gl.convert_layout(x.reshape([PARTS, M, COLUMNS]), TARGET, assert_trivial=True)


@gluon.jit
def column_of(index):
    """The output's column that :func:`right_operand` has at ``index``: bits 0 and 2 change places.

    So lanes that read shared memory together read rows four apart, whose swizzled lines do not collide.
    """
    return (index & -6) | ((index & 1) << 2) | ((index >> 2) & 1)


@gluon.jit
def columns_in_order(values):
    """``[..., M, N]`` of a product with :func:`right_operand`, the output's columns in order."""
    PARTS: gl.constexpr = values.shape[0]
    M: gl.constexpr = values.shape[1]
    N: gl.constexpr = values.shape[2]
    apart = values.reshape([PARTS, M, N // 8, 2, 2, 2])
    return apart.permute((0, 1, 2, 5, 4, 3)).reshape([PARTS, M, N])
