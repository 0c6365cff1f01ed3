"""NF4 levels looked up in shared memory: both codes of a byte at once. Compiled only: never interpreted.

A table of 256 words, one for each byte, is kept in several copies, a word of each beside the other. With 32
copies each lane of a warp reads from a bank of its own. Two weights take three instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import num_warps

from ao_kernels.device.assembly import NF4_BITS_BFLOAT16, NF4_BITS_FLOAT16, level_asm

# Registers a to d: levels of bytes 0 to 3 of {word}, that of the low code in the low half. {copy}: where the
# lane's copy of the table starts; {bytes}: from an entry to the next.
_LOOK_UP = """
    .reg .b32 a, b, c, d;
    and.b32 a, {word}, 255;
    prmt.b32 b, {word}, 0, 0x4441;
    prmt.b32 c, {word}, 0, 0x4442;
    shr.u32 d, {word}, 24;
    mad.lo.u32 a, a, {bytes}, {copy};
    mad.lo.u32 b, b, {bytes}, {copy};
    mad.lo.u32 c, c, {bytes}, {copy};
    mad.lo.u32 d, d, {bytes}, {copy};
    ld.shared.b32 a, [a];
    ld.shared.b32 b, [b];
    ld.shared.b32 c, [c];
    ld.shared.b32 d, [d];
"""


def looking_up_asm(word: str, copy: str, copies: int, outputs: str) -> str:
    """Assembly that looks up the eight codes of ``word``, into ``a`` to ``d``; then ``outputs``."""
    return "{" + _LOOK_UP.format(word=word, copy=copy, bytes=4 * copies) + outputs + "}"


def _fill_asm(half: bool, copies: int, warps: int) -> str:
    """Assembly that fills the table, 16 bytes of copies side by side at a time; ``$0``: where it starts.

    A thread writes every ``at_once``-th entry, from one on that depends on it: the low codes of its entries
    are one or a few, which it looks up; high codes are known here.
    """
    bits = NF4_BITS_FLOAT16 if half else NF4_BITS_BFLOAT16
    at_once = 32 * warps * 4 // copies  # entries that all threads together write with one store
    lines = [
        f".shared .align 16 .b32 table[{256 * copies}];",
        ".reg .b32 start, thread, first, code, upper, index, a, b, c, d, word;",
        ".reg .pred beyond;",
        "mov.u32 start, table;",
        "mov.u32 thread, %tid.x;",
        f"shr.u32 first, thread, {(copies // 4).bit_length() - 1};",
        "mad.lo.u32 thread, thread, 16, start;",
    ]
    lows = max(16 // at_once, 1)
    for low in range(lows):
        lines.append(f".reg .b32 low{low}; add.u32 code, first, {low * at_once}; and.b32 code, code, 15;")
        lines.append(level_asm(bits, "code", f"low{low}"))
    if at_once > 16:
        lines.append("shr.u32 upper, first, 4;")
    for store in range(256 // at_once):
        high = store * at_once // 16
        lines.append(f"mov.b32 word, {bits[high] << 16};")
        for more in range(1, at_once // 16):
            lines.append(f"setp.eq.u32 beyond, upper, {more};")
            lines.append(f"selp.b32 word, {bits[high + more] << 16}, word, beyond;")
        lines.append(f"or.b32 word, word, low{store % lows};")
        lines.append(f"st.shared.v4.b32 [thread+{store * at_once * copies * 4}], {{word, word, word, word}};")
    lines.append(f"bar.sync 0, {32 * warps};")
    lines.append("mov.b32 $0, start;")
    return "\n".join(["{", *lines, "}"])


# $0 to $3: of bytes 0, 2, 1 and 3 of the word $4.
_EVEN_BEFORE_ODD = "mov.b32 $0, a; mov.b32 $1, c; mov.b32 $2, b; mov.b32 $3, d;"
LOOKING_UP = tl.constexpr(
    {copies: looking_up_asm("$4", "level_copy", copies, _EVEN_BEFORE_ODD) for copies in (16, 32)}
)
FILLING = tl.constexpr(
    {
        100 * copies + 2 * warps + half: _fill_asm(half == 1, copies, warps)
        for half in (0, 1)
        for copies in (16, 32)
        for warps in (1, 2, 4, 8)
    }
)


@triton.jit
def fetch_ahead(pointers):
    """Ask for the lines that ``pointers`` lie in, without waiting."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.uint64)], tl.uint32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def fill_levels(DTYPE: tl.constexpr, COPIES: tl.constexpr):
    """Fill the table, ``COPIES`` KB, once in a kernel, and wait for all threads: where it starts."""
    HALF: tl.constexpr = 1 if DTYPE == tl.float16 else 0
    ASSEMBLY: tl.constexpr = FILLING[100 * COPIES + 2 * num_warps() + HALF]
    return tl.inline_asm_elementwise(ASSEMBLY, "=r", [], tl.uint32, is_pure=False, pack=1)


@triton.jit
def lane_copy(table, COPIES: tl.constexpr):
    """Where the copy starts that a lane reads. A scalar, but each lane has its own."""
    lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], tl.uint32, is_pure=False, pack=1)
    return table + lane % COPIES * 4


@triton.jit
def keep_copy(copy):
    """Put :func:`lane_copy` into a register that :func:`pairs_of_levels` knows by name.

    If looking up took more than codes, Triton would not read them in the layout of the tensor cores' operand.
    """
    tl.inline_asm_elementwise(
        ".reg .b32 level_copy; mov.b32 level_copy, $1; mov.b32 $0, $1;", "=r,r", [copy], tl.uint32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def pairs_of_levels(codes, DTYPE: tl.constexpr, COPIES: tl.constexpr):
    """NF4 levels of bytes ``[N, K]``, twice ``[N, K]``: of bytes 2i and of bytes 2i + 1.

    The level of the low code takes the place of byte 2i, that of the high code the place of byte 2i + 1: a
    register holds bytes that are neighbours along K, and is filled by one load.
    """
    ASSEMBLY: tl.constexpr = LOOKING_UP[COPIES]
    even, odd = tl.inline_asm_elementwise(
        ASSEMBLY, "=r,=r,=r,=r,r", [codes], (tl.uint16, tl.uint16), is_pure=True, pack=4
    )
    return even.to(DTYPE, bitcast=True), odd.to(DTYPE, bitcast=True)


@triton.jit
def pairs_of_columns(words, DTYPE: tl.constexpr):
    """Words ``[K, M]`` of two activations, in the same order: of words 2i and of words 2i + 1.

    As above, a thread must hold neighbours along K: so it does where words lie as the operand of the small
    matrix instructions, as tests make sure.
    """
    even, odd = tl.inline_asm_elementwise(
        "mov.b32 $0, $2; mov.b32 $1, $3;", "=&r,=&r,r,r", [words], (tl.uint16, tl.uint16),
        is_pure=True, pack=2,
    )  # fmt: skip
    return even.to(DTYPE, bitcast=True), odd.to(DTYPE, bitcast=True)
