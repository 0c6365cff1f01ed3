"""Launching the Triton kernel of ``gptq_columns``, and when it can."""

from __future__ import annotations

import torch

from ao_core import Key, triton_support

_MOST_COLUMNS = 256  # errors of a program's rows and all columns are in its registers
_ROWS = 16


def rejects(key: Key, *, provider: str) -> str | None:
    """Why the kernel can't run here, or None."""
    if reason := triton_support.rejects(key, provider):
        return reason
    upper, table, _ = key.weights
    if key.dtype != torch.float32:
        return f"it takes float32 columns, not {key.dtype}"
    if upper is not None and upper[0][-1] > _MOST_COLUMNS:
        return f"it takes {_MOST_COLUMNS} columns at most, not {upper[0][-1]}"
    if table is not None and table[0][-1] > 16:
        return f"it takes code books of 16 levels at most, not of {table[0][-1]}"
    return None


def columns(
    w: torch.Tensor, upper: torch.Tensor, table: torch.Tensor, groups: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :data:`ao_gptq.columns.GPTQ_COLUMNS`."""
    import triton

    from ao_gptq.device.columns import gptq_columns

    w, upper, table, groups = (each.contiguous() for each in (w, upper, table, groups))
    stack, n, c = w.shape
    steps, errors = torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(w)
    with torch.cuda.device_of(w):  # Triton launches on the current device, whatever the tensors'
        gptq_columns[(triton.cdiv(n, _ROWS), stack)](
            w, upper, table, groups, steps, errors, n, c, table.shape[2],
            LEVELS=levels, WIDTH=table.shape[3], BLOCK_N=_ROWS, BLOCK_C=max(triton.next_power_of_2(c), 16),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return steps, errors
