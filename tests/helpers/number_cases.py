"""Sizes, dtypes, devices and values that tests of numerics go through."""

from __future__ import annotations

import torch

SIZES = [1, 17, 63, 100, 576]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def make(*shape, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def hard_rows(columns, dtype=torch.float32, device="cpu"):
    """Zeros, a constant, an outlier, tiny, large, all positive, all negative, ordinary."""
    rows = make(8, columns)
    rows[0] = 0
    rows[1] = -0.37
    rows[2, 0] = 1000
    rows[3] *= 1e-7
    rows[4] *= 1e3
    rows[5] = rows[5].abs() + 5
    rows[6] = -rows[6].abs() - 5
    return rows.to(device, dtype)
