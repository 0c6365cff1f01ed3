"""The 2:4 schemes and their kernels against the kit, on weights that are pruned."""

from __future__ import annotations

import torch

from ao_core.testing import parametrize_kernel_checks, parametrize_scheme_checks
from ao_sparsity.masks import least_of_groups


def pruned(weight: torch.Tensor) -> torch.Tensor:
    rows = weight.reshape(-1, weight.shape[-1])
    return rows.masked_fill(least_of_groups(rows.abs(), 2, 4), 0).view(weight.shape)


@parametrize_scheme_checks("semi-sparse", "semi-sparse-int8-dynamic", fit=pruned)
def test_scheme(check):
    check()


@parametrize_kernel_checks("semi_sparse_linear", "semi_sparse_int8_linear", "semi_sparse_packed_linear")
def test_kernel(check):
    check()
