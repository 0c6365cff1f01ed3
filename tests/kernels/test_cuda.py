"""What only GPUs show: a second device, and kernels whose first call is compiled into a CUDA graph."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from kernel_weights import OPS

from ao_core.kernels import key_of
from ao_core.testing.kernels import TOLERANCE, kernels_of

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCHEMES = (
    "int4-weight-only", "nf4", "int8-weight-only", "int8-dynamic", "int8-dynamic-int4-weight",
    "float8-weight-only", "float8-dynamic",
)  # fmt: skip
FIRST_CALL = """
import sys

import torch
import torch.nn.functional as F
from torch._inductor import cudagraph_trees

import ao_core as ao

weight = ao.parse_scheme(sys.argv[1]).quantize(torch.randn(512, 1024).bfloat16().cuda())


def step(x):
    return F.linear(torch.relu(x), weight) * 2


with torch.no_grad():
    for rows in (1, 24, 200):
        x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
        torch._dynamo.reset()
        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)
        found = [compiled(x).clone() for _ in range(4)]
        assert all(torch.equal(found[0], each) for each in found), f"replays differ at {rows} rows"
        torch.testing.assert_close(found[0], step(x))
        assert cudagraph_trees.get_container(0).tree_manager is not None, "no graph was recorded"
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPS)
def test_the_second_gpu(op):
    """Launched on the tensors' device, not on the current one."""
    device = torch.device("cuda:1")
    torch.cuda.set_device(0)
    ran = 0
    for one, kernel in kernels_of(op):
        if kernel.provider != "triton":
            continue
        for args in one.samples(device):
            if kernel.rejects(key_of(one, args)) is None:
                ran += 1
                found, expected = kernel.fn(*args), one.reference(*args)
                assert found.device == device
                assert torch.cuda.current_device() == 0
                limit = TOLERANCE.get(expected.dtype, 0.0) * float(expected.double().norm())
                assert float((found.double() - expected.double()).norm()) <= limit
    assert ran


@on_gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_first_call_in_a_cuda_graph(scheme, tmp_path):
    """In a fresh process, with nothing compiled before; for each of the ways that rows decide."""
    settings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL, scheme],
        env=settings, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
