"""Columns as an op: the same codes as by the scheme, in the reference, interpreted, and compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from small_models import gaussian, hessian_of, inputs

import ao_core as ao
from ao_gptq import columns
from ao_gptq.factor import Factor
from ao_gptq.gptq import gptq

EVEN = [
    "int4-weight-only:group_size=32",
    "int4-weight-only:group_size=64,zero_point=integer",
    "int4-weight-only:group_size=-1,zero_point=None",
    "int8-weight-only:group_size=10",
    "int8-dynamic",
    "int8-dynamic-int4-weight",
    "uint4",
    "ternary",
]
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is for Linux alone")

INTERPRETED = """
import torch
from ao_core import KERNELS
from ao_core.testing.kernels import check_equals_reference, check_inputs_unchanged
from ao_core.testing.kernels import check_non_contiguous, kernels_of
found = [(op, kernel) for op, kernel in kernels_of("gptq_columns") if kernel.provider == "triton_interpreted"]
assert len(found) == 1
for check in (check_equals_reference, check_inputs_unchanged, check_non_contiguous):
    check(*found[0], torch.device("cpu"))
print("ok")
"""


@pytest.mark.parametrize("scheme", EVEN)
def test_integers_have_even_levels(scheme):
    found = columns.levels_of(ao.parse_scheme(scheme))
    assert found is not None and found.even
    assert found.count == {"ternary": 3, "int8-dynamic": 256, EVEN[3]: 256}.get(scheme, 16)


def test_a_code_book_has_growing_levels_and_floats_have_none():
    found = columns.levels_of(ao.parse_scheme("nf4"))
    assert found is not None and not found.even and (found.low, found.count) == (0, 16)
    assert columns.levels_of(ao.parse_scheme("float8-weight-only")) is None


@pytest.mark.parametrize("scheme", [*EVEN, "nf4", "nf4:qparams=mse,block_size=17"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("stack", [1, 3])
def test_the_op_gives_the_schemes_own_codes(scheme, act_order, stack, monkeypatch):
    """But for values between two levels, which the two may round differently."""
    made, weight = ao.parse_scheme(scheme), gaussian(stack, 17, 100)
    factors = [Factor.of(hessian_of(inputs(100, seed=i)), act_order=act_order) for i in range(stack)]
    slow = gptq(weight, factors, made, block_size=33)
    monkeypatch.setattr(columns, "accelerated", lambda device: True)
    with ao.use_provider("reference", op="gptq_columns"):
        fast = gptq(weight, factors, made, block_size=33)
        alone = gptq(weight[-1], factors[-1], made, block_size=33)
    assert fast.codes.dtype == slow.codes.dtype and fast.codes.shape == weight.shape
    assert (fast.codes == slow.codes).double().mean() > 0.97
    assert (fast.codes[-1] == alone.codes).double().mean() > 0.97


@triton
def test_the_kernel_equals_the_reference_under_the_interpreter():
    settings = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.split()[-1] == "ok", done.stderr[-3000:]


def compile_all(architecture: int) -> int:
    """Compile the kernel for each kind of table and some widths; how many there were."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ao_gptq.device.columns import gptq_columns as kernel

    names = kernel.arg_names
    pointers = dict.fromkeys(("w_ptr", "upper_ptr", "table_ptr", "errors_ptr"), "*fp32")
    pointers |= {"groups_ptr": "*i32", "steps_ptr": "*u8"}
    done = 0
    for levels, width in ((16, 2), (256, 2), (16, 16), (3, 3)):
        for block in (16, 128, 256):
            constants = {"LEVELS": levels, "WIDTH": width, "BLOCK_N": 16, "BLOCK_C": block}
            signature = {
                name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
            }
            source = ASTSource(
                fn=kernel,
                signature=signature,
                constexprs={(names.index(name),): value for name, value in constants.items()},
                attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
            )
            compiler.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
            done += 1
    return done


@triton
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernel_compiles(architecture, tmp_path):
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    settings["PYTHONPATH"] = os.pathsep.join(sys.path)  # helpers too
    done = subprocess.run(
        [sys.executable, __file__, str(architecture)],
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) == 12


if __name__ == "__main__":
    print(compile_all(int(sys.argv[1])))  # noqa: T201
