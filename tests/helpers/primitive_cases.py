"""Sizes, dtypes and weights for the tests of torchao's primitives."""

from __future__ import annotations

import torch

from ao_quant import primitives as q

SIZES = [1, 17, 63, 100, 576]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
EPS = torch.finfo(torch.float32).eps


def make(*shape, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def uniform(*shape, seed=0):
    """In [-1, 1): the input for which 8 bits promise 45 dB (a normal one has 42)."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def sqnr(exact, got):
    exact, got = exact.double(), got.double()
    return (20 * torch.log10(exact.norm() / (exact - got).norm())).item()


def int8_weight(n, k, dtype=torch.float32, device="cpu"):
    """``(weight [N, K], codes [K, N], scales [N])``."""
    weight = make(n, k, seed=1, dtype=dtype, device=device)
    codes, scales, _ = q.dynamically_quantize_per_channel(weight, -128, 127, torch.int8)
    return weight, codes.t(), scales
