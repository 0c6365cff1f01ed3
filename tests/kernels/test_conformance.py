"""Every Triton kernel computes what its op's reference does: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from kernel_weights import OPS

from ao_core.testing.kernels import KERNEL_CHECKS, kernels_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROVIDER = "triton" if DEVICE.type == "cuda" else "triton_interpreted"
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="neither a GPU nor TRITON_INTERPRET=1",
)


@pytest.mark.parametrize("check", KERNEL_CHECKS.values(), ids=KERNEL_CHECKS)
@pytest.mark.parametrize("op", OPS)
def test_conformance(op, check):
    (found,) = [(op, kernel) for op, kernel in kernels_of(op) if kernel.provider == PROVIDER]
    check(*found, DEVICE)
