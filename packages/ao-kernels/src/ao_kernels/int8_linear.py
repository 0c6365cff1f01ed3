"""Linears with int8 weights, on float and on int8 activations; and int8 products by themselves."""

from __future__ import annotations

import torch

from ao_core import Key
from ao_kernels.support import group_misfit


def weight_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """``x @ (codes * scale).T + bias``, summed in float32.

    Args:
        x: bfloat16 or float16 ``[..., K]``.
        codes: int8 ``[N, K]``.
        scale: float ``[N, G]``.
        bias: float ``[N]`` or None.
        group_size: columns to a scale; -1 for all.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    from ao_kernels.weight_linear import Codes
    from ao_kernels.weight_linear import weight_linear as run

    return run(x, Codes("int8", codes, scale, group_size), bias)


def weight_misfit(key: Key) -> str | None:
    """Why the weights of a call of ``int8_weight_linear`` can't be read, or None."""
    _, scale, *_ = key.weights
    return group_misfit(key.options[0], scale, 16)


def dynamic_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Activations rounded to int8, one scale a token, times int8 weights; sums are exact.

    Args:
        x: bfloat16 or float16 ``[..., K]``.
        codes: int8 ``[N, K]``.
        scale: float ``[N, 1]``.
        bias: float ``[N]`` or None.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    from ao_kernels.int8_mm import dynamic_linear as run

    return run(x, codes, scale, bias)


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in int32, exact, for int8 ``[M, K]`` and ``[K, N]``; fastest where ``b`` is a transpose."""
    from ao_kernels.int8_mm import scaled_mm as run

    return run(a, b.t(), None, None, None, torch.int32)


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(a @ b) * row_scale * column_scale + bias``, scaled in float32.

    Args:
        a: int8 ``[M, K]``.
        b: int8 ``[K, N]``.
        row_scale: float ``[M]``.
        column_scale: float ``[N]`` or None.
        bias: float ``[N]`` or None.
        dtype: of the result.
    """
    from ao_kernels.int8_mm import scaled_mm as run

    return run(a, b.t(), row_scale, column_scale, bias, dtype)


def mm_misfit(key: Key) -> str | None:
    """Why the operands of ``int8_mm`` or ``int8_scaled_mm`` can't be multiplied, or None."""
    dtypes = {key.dtype, *(each[1] for each in key.weights[:1] if each)}
    return (
        None
        if dtypes == {torch.int8}
        else f"it multiplies int8, not {' and '.join(sorted(map(str, dtypes)))}"
    )


def dynamic_misfit(key: Key) -> str | None:
    """Why the weights of a call of ``int8_dynamic_linear`` can't be read, or None."""
    return None
