"""Rows sorted by expert times a stack of weights in codes: one launch for all experts."""

from __future__ import annotations

import dataclasses

import torch
import triton

from ao_kernels.configs import Config, Decoded, Few, Many, Registers, experts_config, weight_config
from ao_kernels.device.experts import few_rows_experts, many_rows_experts
from ao_kernels.rows import columns_in_order, pairs_of_columns, plain_rows
from ao_kernels.support import hopper
from ao_kernels.weight_linear import (
    Codes,
    check_columns,
    dequantized,
    nf4_table,
    on_device,
    readable,
    rows_of,
    strides,
)

_FEW = 8
_DECODED_ROWS = 128
"""Of an expert, that tiles are taken for where a stack can't be multiplied in floats."""


def experts_linear(
    x: torch.Tensor,
    offsets: torch.Tensor | None,
    weight: Codes,
    experts: int,
    config: Few | Many | Registers | Decoded | None = None,
) -> torch.Tensor:
    """Each row of ``x`` times its expert's weight, transposed, summed in float32.

    Args:
        x: bfloat16 or float16 ``[S, K]``, sorted by expert.
        offsets: int32 or int64 ``[E]``: where the rows of each expert end; rows after the last give zeros.
            None: all experts have S / E rows.
        weight: the stack, all experts' rows one below the other: ``[E * N, K]``; see :func:`stacked`.
        experts: E.
        config: the kernel and its tiles; by default the table's for S / E rows.

    Returns:
        ``[S, N]`` in the dtype of ``x``.

    Raises:
        RuntimeError: columns, rows or offsets that do not fit.
    """
    width = weight.codes.shape[1]
    check_columns(x, *((2 * width - 1, 2 * width) if weight.packed else (width,)))
    _check_rows(x, offsets, experts)
    out = x.new_empty(x.shape[0], weight.codes.shape[0] // max(experts, 1))
    if not out.numel():
        return out
    config = config or _config(x, offsets, weight, experts)
    with on_device(x.device):
        if isinstance(config, Decoded):
            return _decoded(x, offsets, weight, out, experts)
        if isinstance(config, Registers):
            from ao_kernels.hopper_linear import launch_experts  # Gluon is imported where it is needed

            launch_experts(x, weight, _ends(x, offsets, experts), out, config)
            return out
        return _launch(x, offsets, weight, out, experts, config)


def stacked(weight: Codes) -> tuple[Codes, int]:
    """A stack ``[E, N, K]`` as ``[E * N, K]``, and E. Without a copy, unless the stack was cut along N."""

    def flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor.flatten(0, 1) if tensor is not None and tensor.ndim == 3 else tensor

    parts = {name: flat(getattr(weight, name)) for name in ("codes", "scale", "zero", "offset", "step")}
    return dataclasses.replace(weight, **parts), weight.codes.shape[0]  # type: ignore[arg-type]


def _check_rows(x: torch.Tensor, offsets: torch.Tensor | None, experts: int) -> None:
    if offsets is None and x.shape[0] % max(experts, 1):
        raise RuntimeError(
            f"{experts} experts share rows {tuple(x.shape)} equally without offsets: give offsets, or a "
            f"multiple of {experts} rows."
        )
    fits = offsets is None or (
        tuple(offsets.shape) == (experts,) and offsets.dtype in (torch.int32, torch.int64)
    )
    if not fits:
        raise RuntimeError(
            f"{experts} experts need as many offsets in int32 or int64, and were given "
            f"{offsets.dtype} {tuple(offsets.shape)}."  # type: ignore[union-attr]
        )


def _ends(x: torch.Tensor, offsets: torch.Tensor | None, experts: int) -> torch.Tensor:
    """Where the rows of each expert end."""
    if offsets is not None:
        return offsets.contiguous()
    each = x.shape[0] // experts
    return torch.arange(each, x.shape[0] + 1, each, dtype=torch.int32, device=x.device)


def _config(
    x: torch.Tensor, offsets: torch.Tensor | None, weight: Codes, experts: int
) -> Few | Many | Registers | Decoded:
    """The table's for a mean expert. Programs of all experts run side by side, so K is not cut."""
    busy = min(x.shape[0], experts)
    if hopper(x.device) and readable(x, weight, words=True):
        specialized = experts_config(weight.kind, x.shape[0], experts)
        if specialized is not None:
            return specialized
    rows, n = triton.cdiv(x.shape[0], busy), weight.codes.shape[0] // experts
    if offsets is not None and rows <= _FEW and x.shape[0] > _FEW:
        rows = max(2 * rows, 4)  # they vary: one tile is enough for most experts
    found: Config = weight_config(weight.kind, rows, n * busy, x.shape[1], fine=weight.fine)
    if isinstance(found, Decoded) and not (offsets is None or _groupable(x, n)):
        found = weight_config(weight.kind, _DECODED_ROWS, n * busy, x.shape[1])
    if isinstance(found, Many):
        return dataclasses.replace(found, split_k=1)
    assert isinstance(found, (Few, Decoded))
    return found


def _groupable(x: torch.Tensor, n: int) -> bool:
    """Whether torch's grouped product takes ``x`` and weights with ``n`` rows: whole 16 bytes of bfloat16."""
    aligned = x.stride(1) == 1 and not (x.shape[1] % 8 or n % 8 or x.stride(0) % 8 or x.data_ptr() % 16)
    return hasattr(torch.nn.functional, "grouped_mm") and x.dtype == torch.bfloat16 and aligned


def _launch(
    x: torch.Tensor,
    offsets: torch.Tensor | None,
    weight: Codes,
    out: torch.Tensor,
    experts: int,
    config: Few | Many,
) -> torch.Tensor:
    codes, *parameters = weight.pointers()
    (s, n), width = out.shape, codes.shape[1]
    size, block_m = weight.tile_bytes(config.bytes), config.block_m
    constants = weight.constants(x.dtype)
    if isinstance(config, Few):
        block_m = rows_of(config)
        x = pairs_of_columns(x) if weight.packed else plain_rows(x)
        kernel, step, more = few_rows_experts, size * config.splits, {"SPLITS": config.splits}
    else:
        x = columns_in_order(x, width, size, constants["DTYPE"]) if weight.packed else plain_rows(x)
        kernel, step, more = many_rows_experts, size, {}
    each = 0 if offsets is not None else s // experts
    tiles = experts * triton.cdiv(each, block_m)
    if offsets is not None:  # an expert's last tile may be short, and so may that of the rows of none
        tiles = s // block_m + min(experts + 1, s)
    kernel[(tiles * triton.cdiv(n, config.block_n),)](
        x, codes, *parameters, codes if offsets is None else offsets.contiguous(), out, nf4_table(out),
        s, experts, each, tiles, n, width, x.stride(0), *strides(weight, codes, parameters[0]),
        **constants, EXPERTS=0 if offsets is None else triton.next_power_of_2(experts + 1), **more,
        BLOCK_N=config.block_n, BLOCK_M=block_m, BYTES=size, STAGES=config.stages,
        WHOLE=width % step == 0 and n % config.block_n == 0, num_warps=config.warps,
    )  # fmt: skip
    return out


def _decoded(
    x: torch.Tensor, offsets: torch.Tensor | None, weight: Codes, out: torch.Tensor, experts: int
) -> torch.Tensor:
    """The stack in floats, and torch's product: some experts at a time, or all where it needs offsets."""
    (s, n), k = out.shape, x.shape[1]
    if offsets is not None:
        floats = dequantized(weight, k, x.dtype, slice(0, experts * n)).view(experts, n, k)
        product = torch._grouped_mm(x, floats.transpose(1, 2), offsets.to(torch.int32))
        beyond = torch.arange(s, device=x.device) >= offsets[-1]
        return product.masked_fill_(beyond.unsqueeze(1), 0)  # torch leaves them unwritten
    rows, results = x.reshape(experts, -1, k), out.view(experts, -1, n)
    at_once = max((Decoded().megabytes << 20) // (n * k * x.element_size()), 1)
    for start in range(0, experts, at_once):
        part = slice(start, min(start + at_once, experts))
        floats = dequantized(weight, k, x.dtype, slice(part.start * n, part.stop * n)).view(-1, n, k)
        torch.bmm(rows[part], floats.transpose(1, 2), out=results[part])
    return out
