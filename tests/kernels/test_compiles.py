"""Every kernel compiles for sm80 and sm90, down to machine code, on a machine without a GPU.

Run as a script this file compiles: ``test_compiles.py ARCHITECTURE``. Triton's interpreter must be off then.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

WEIGHTS = (  # kind, zero, coded, bytes to a scale, the scale's type
    ("INT4", 0, 0, 64, "*bf16"),
    ("INT4", 1, 0, 64, "*bf16"),
    ("INT4", 2, 0, 32, "*fp32"),
    ("NF4", 0, 1, 32, "*u8"),
    ("NF4", 0, 2, 32, "*u8"),
    ("NF4", 0, 0, 32, "*fp32"),
    ("INT8", 0, 0, 0, "*fp32"),
    ("INT8", 0, 0, 64, "*fp32"),
    ("FLOAT8", 0, 0, 0, "*fp32"),
)


def builder(architecture: int):
    """``build(kernel, pointers, constants, warps)``, which counts in ``build.done``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def build(kernel, pointers, constants, warps=4):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={
                (names.index(name),): [["tt.divisibility", 16]]
                for name in names
                if signature[name].startswith("*")
            },
        )
        build.done += 1
        return triton.compile(
            source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps}
        )

    build.done = 0
    return build


def compile_tables(build, pointers, base) -> None:
    """Tiles for few rows that look NF4 levels up in shared memory: they pair neighbours, and have room."""
    from ao_kernels.configs import Few, weight_config
    from ao_kernels.device.few_rows import few_rows
    from ao_kernels.support import of_a_warp

    cells = itertools.product(range(1, 64), (64, 9999), (64, 9999))
    every = {weight_config("nf4", m, n, k, hopper=True) for m, n, k in cells}
    used = [each for each in every if isinstance(each, Few) and each.copies]
    assert used
    others = [Few(1, 128, 8, 8, 64, 3, copies=32), Few(1, 64, 16, 2, 64, 3, copies=32)]
    for tiles in [each for each in used + others if of_a_warp(each.warps, each.splits * each.block_m)]:
        tile = {"SPLITS": tiles.splits, "BLOCK_N": tiles.block_n, "BLOCK_M": tiles.block_m}
        tile |= {"COPIES": tiles.copies, "STAGES": tiles.stages, "BYTES": min(tiles.bytes, base["BYTES"])}
        built = build(few_rows, pointers, {**base, **tile}, tiles.warps)
        check_pairs(built.asm["ttgir"])
        own = built.metadata.shared  # Triton asks the device for more than 48 KB only if its own is more
        assert tiles in others or own > 48 << 10 or own + 1024 * tiles.copies <= 48 << 10, (tiles, own)


def compile_all(architecture: int) -> int:
    """Compile each kernel for each kind of weight and dtype; how many there were."""
    import triton.language as tl

    from ao_kernels.device import activations, decode
    from ao_kernels.device.dequantize import dequantize
    from ao_kernels.device.experts import few_rows_experts, many_rows_experts
    from ao_kernels.device.few_rows import few_rows
    from ao_kernels.device.many_rows import add_parts, many_rows

    build = builder(architecture)
    every = [(tl.bfloat16, "*bf16"), (tl.float16, "*fp16")]  # on sm80 one is enough to see that they compile
    for (dtype, float_type), weight in itertools.product(every if architecture == 90 else every[:1], WEIGHTS):
        kind, zero, coded, group, scale = weight
        pointers = {
            "codes_ptr": "*u8",
            "scale_ptr": scale,
            "zero_ptr": "*u8" if zero == 2 else "*bf16",
            "offset_ptr": "*fp32",
            "step_ptr": "*fp32",
            "bias_ptr": float_type,
            "out_ptr": float_type,
            "table_ptr": "*fp32",
            "x_ptr": float_type,
        }
        size = 32 if group == 32 else 64
        base = {
            "KIND": getattr(decode, kind).value,
            "ZERO": zero,
            "CODED": coded,
            "DTYPE": dtype,
            "GROUP": group,
            "BYTES": size,
            "INTERPRET": False,
        }
        words = {"x_ptr": "*i32"} if kind in ("INT4", "NF4") else {}
        for whole in (True, False):
            few = {
                "BIAS": True,
                "SPLITS": 4,
                "BLOCK_N": 16,
                "BLOCK_M": 2,
                "STAGES": 3,
                "WHOLE": whole,
                "COPIES": 0,
            }
            build(few_rows, {**pointers, **words}, {**base, **few}, 2)
            if kind == "NF4" and architecture == 90:
                compile_tables(build, {**pointers, **words}, {**base, **few})
            many = {"BIAS": True, "BLOCK_N": 64, "BLOCK_M": 64, "STAGES": 3, "WHOLE": whole, "SPLIT_K": 2}
            build(many_rows, pointers, {**base, **many})
        build(dequantize, pointers, {**base, "ROWS": 32})
        if kind == "NF4":
            build(dequantize, {**pointers, "out_ptr": "*fp32"}, {**base, "ROWS": 32, "DTYPE": tl.float32})
        of_stacks = ((8, "*i32"), (0, "*i64")) if dtype == tl.bfloat16 else ()
        for experts, offsets in of_stacks:
            of_experts = {**base, "EXPERTS": experts, "WHOLE": experts > 0, "BLOCK_N": 32, "STAGES": 3}
            ends = {**pointers, "offsets_ptr": offsets}
            build(few_rows_experts, {**ends, **words}, {**of_experts, "SPLITS": 2, "BLOCK_M": 4}, 2)
            build(many_rows_experts, ends, {**of_experts, "BLOCK_M": 32})
    compile_bytes(build, architecture)
    floats = {"x_ptr": "*bf16", "out_ptr": "*bf16"}
    build(activations.order_columns, floats, {"BYTES": 32, "DTYPE": tl.bfloat16, "BLOCK": 1024})
    if architecture == 90:
        build.done += compile_hopper()
    parts = {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    build(add_parts, parts, {"PARTS": 4, "BIAS": True, "BLOCK": 1024})
    return int(build.done)


def check_pairs(text: str) -> None:
    """Bytes and words that assembly takes in pairs lie as operands of a warp's matrix instructions."""
    asked = [line for line in text.splitlines() if "elementwise_inline_asm" in line]
    for start in ("$2; mov.b32 $1, $3;", "level_copy;\\0A    ld.shared"):
        (line,) = (line for line in asked if start in line)
        assert "#ttg.dot_op" in line.split(" : tensor", 1)[1].split("->")[0], line


def compile_bytes(build, architecture: int) -> None:
    """The same for products of int8 and float8, and activations quantized for them and for 4-bit codes."""
    from ao_kernels.device import activations, int8_gemm

    tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 8, "STAGES": 3}
    forms = [(False, scaled, "i8") for scaled in (0, 1, 2)]
    forms += [(True, 2, "fp8e4nv")] if architecture >= 89 else []
    for float8, scaled, codes in forms:
        pointers = {"out_ptr": "*bf16" if scaled else "*i32", "x_scale_ptr": "*fp32", "scale_ptr": "*fp32"}
        pointers["bias_ptr"] = "*bf16"
        flags = {**tiles, "FLOAT": float8, "SCALED": scaled, "BIAS": scaled > 0}
        both = {**pointers, "x_ptr": f"*{codes}", "w_ptr": f"*{codes}"}
        for block_m, whole in ((16, True), (64, False)):
            build(int8_gemm.int8_gemm, both, {**flags, "BLOCK_M": block_m, "WHOLE": whole})
        if architecture >= 90:
            desc = f"tensordesc<{codes}[64,128]>"
            build(int8_gemm.int8_gemm_copy_engine, {**pointers, "x_desc": desc, "w_desc": desc}, flags)
    for float8, once in itertools.product({form[0] for form in forms}, (True, False)):
        rows = {"x_ptr": "*bf16", "codes_ptr": "*fp8e4nv" if float8 else "*i8", "scale_ptr": "*fp32"}
        form = {"EPS": 1e-5, "LARGEST": 448.0 if float8 else 127.0, "INTERPRET": False}
        build(activations.quantize_rows, rows, {**form, "BLOCK": 4096, "ONCE": once})
    build(activations.round_tokens, {"x_ptr": "*bf16", "out_ptr": "*bf16"}, {"EPS": 1e-7, "BLOCK": 4096})


def compile_hopper() -> int:
    """The same for the kernels in Gluon."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from ao_kernels.device import decode
    from ao_kernels.device.from_registers import from_registers
    from ao_kernels.device.pieces import add_tiles
    from ao_kernels.device.warp_parts import warp_parts
    from ao_kernels.device.warp_specialized import warp_specialized

    done = 0

    def tiles(rows, columns, dtype, name):
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
        return f"tensordesc<{name}[{rows}, {columns}],{layout!r}>"

    def build(kernel, weight, constants, warps, descriptors):
        nonlocal done
        kind, zero, coded, group, scale = weight
        names = kernel.arg_names
        pointers = dict(zip(("x_desc", "codes_desc"), descriptors, strict=True)) | {
            "scale_ptr": scale,
            "zero_ptr": "*u8" if zero == 2 else "*bf16",
            "offset_ptr": "*fp32",
            "step_ptr": "*fp32",
            "bias_ptr": "*bf16",
            "offsets_ptr": "*i32",
            "parts_ptr": "*fp32",
            "out_ptr": "*bf16",
        }
        constants = {
            **constants, "KIND": getattr(decode, kind).value, "ZERO": zero, "CODED": coded, "BIAS": True,
            "DTYPE": gl.bfloat16, "GROUP": group, "num_warps": warps,
        }  # fmt: skip
        source = GluonASTSource(
            fn=kernel,
            signature={
                name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
            },
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        done += 1

    for weight in WEIGHTS:
        packed = weight[0] in ("INT4", "NF4")
        size = 64 if packed else 128
        slots = {"BLOCK_M": 128, "BLOCK_N": 128, "BYTES": size, "RING": 3, "CODES_RING": 2}
        slots["SLICE"] = min(size, weight[3] or 64, 32 if packed else 64)
        descriptors = (tiles(128, 128, gl.bfloat16, "bf16"), tiles(128, 128, gl.uint8, "u8"))
        build(warp_specialized, weight, slots, 8, descriptors)
    for weight, (rows, ring, codes) in [
        (WEIGHTS[0], (16, 8, 3)), (WEIGHTS[0], (256, 5, 2)), *((weight, (64, 8, 3)) for weight in WEIGHTS)
    ]:  # fmt: skip
        descriptors = (tiles(rows, 64, gl.bfloat16, "bf16"), tiles(128, 32, gl.int32, "i32"))
        slots = {"BLOCK_M": rows, "RING": ring, "CODES_RING": codes, "CUT": 1, "EXPERTS": 0, "TABLE": False}
        build(from_registers, weight, slots, 4, descriptors)
        if rows == 64:
            table = weight[0] == "NF4"
            build(from_registers, weight, {**slots, "CUT": 3, "TABLE": table}, 4, descriptors)
            build(from_registers, weight, {**slots, "EXPERTS": 128, "TABLE": table}, 4, descriptors)
    for weight, (parts, columns, rows) in itertools.product(WEIGHTS, [(4, 64, 16), (8, 16, 32)]):
        size = min(64, weight[3] or 64)
        slot = parts * size * (2 if weight[0] in ("INT4", "NF4") else 1)
        descriptors = (
            tiles(rows, slot, gl.bfloat16, "bf16"), tiles(columns, parts * size // 4, gl.int32, "i32")
        )  # fmt: skip
        slots = {"PARTS": parts, "BLOCK_N": columns, "BLOCK_M": rows, "BYTES": size, "RING": 3}
        build(warp_parts, weight, {**slots, "LONG": rows == 32}, parts, descriptors)
    adding = {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    sizes = {"CUT": 4, "BIAS": True, "BLOCK_M": 16, "BLOCK_N": 128, "ROWS": 8, "num_warps": 4}
    names = add_tiles.arg_names
    source = GluonASTSource(
        fn=add_tiles,
        signature={name: "constexpr" if name in sizes else adding.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in sizes.items()},
    )
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return done + 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel_compiles(architecture, tmp_path):
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, __file__, str(architecture)],
        env=settings,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) > 80


if __name__ == "__main__":
    print(compile_all(int(sys.argv[1])))  # noqa: T201
