"""``int4_experts_linear`` and the like: the linears of weights in codes, for stacks of experts."""

from __future__ import annotations

import torch


def _run(
    x: torch.Tensor,
    offsets: torch.Tensor | None,
    kind: str,
    codes: torch.Tensor,
    scale: torch.Tensor,
    group_size: int = -1,
    **rest: torch.Tensor | int | None,
) -> torch.Tensor:
    from ao_kernels.experts_linear import experts_linear, stacked
    from ao_kernels.weight_linear import Codes

    return experts_linear(x, offsets, *stacked(Codes(kind, codes, scale, group_size, **rest)))  # type: ignore[arg-type]


def int4_linear(
    x: torch.Tensor,
    offsets: torch.Tensor | None,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """Rows ``x`` ``[S, K]``, sorted by expert, times a stack whose tensors have E in front.

    Args:
        x: bfloat16 or float16 ``[S, K]``.
        offsets: int32 or int64 ``[E]``, where the rows of each expert end; None: all have S / E.
        packed: uint8 ``[E, N, ceil(K / 2)]``.
        scale: float ``[E, N, G]``.
        zero: see :func:`ao_kernels.int4_linear.linear`.
        group_size: columns to a scale; -1 for all.

    Raises:
        RuntimeError: columns, rows or offsets that do not fit.
    """
    return _run(x, offsets, "int4", packed, scale, group_size, zero=zero)


def nf4_linear(
    x: torch.Tensor,
    offsets: torch.Tensor | None,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    offset: torch.Tensor | None,
    step: torch.Tensor | None,
    block_size: int,
    scaler_block_size: int,
) -> torch.Tensor:
    """The same for :func:`ao_kernels.nf4_linear.linear`."""
    scales = {"offset": offset, "step": step, "scaler_size": scaler_block_size}
    return _run(x, offsets, "nf4", packed, absmax, block_size, **scales)


def int8_linear(
    x: torch.Tensor,
    offsets: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """The same for :func:`ao_kernels.int8_linear.weight_linear`."""
    return _run(x, offsets, "int8", codes, scale, group_size)


def float8_linear(
    x: torch.Tensor, offsets: torch.Tensor | None, codes: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The same for :func:`ao_kernels.float8_linear.linear`; a scale ``[1, 1]`` is that of all experts."""
    return _run(x, offsets, "float8", codes, scale)
