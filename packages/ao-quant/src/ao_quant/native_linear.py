"""Calling the native linear: which path for how many rows, and which weights it can read.

Few rows: one pass over the codes, decoded in registers. Many rows: blocks of weight rows are decoded in the
cache and multiplied on the best unit that the processor has; without one, torch multiplies them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ao_core import Key
from ao_quant import native

# What the codes of a weight are, and what activations are rounded to: as the C code counts them. Plain
# numbers, because an enum's arithmetic would cost a microsecond a call.
INT8, INT4, NF4, FLOAT8 = range(4)
EXACT, SYMMETRIC, AFFINE, FLOAT8_ROWS, FLOAT8_ONE = range(5)

_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.uint8: 3}
_ROOT4 = 4
_NO_UNIT = 1
_ROWS_AT_ONCE = 576  # weight rows dequantized at a time: they stay in the cache, and no large copy is made


def few_rows(half: bool, rounding: int, unit: int) -> int:
    """Up to so many rows, decoding in registers wins.

    2 threads of Zen 4, SmolLM2's shapes: at 8 rows it takes 0.75 of the many-row path's time in bfloat16
    and 0.7 in float32; at 16, twice its time in bfloat16. Where activations become bytes, sums of four
    products a lane win from about 5 rows on, but for 4-bit weights in bfloat16.

    Args:
        half: bfloat16 activations, not float32.
        rounding: of the activations.
        unit: what many rows would be multiplied on, see :func:`ao_quant.native.best_unit`.
    """
    if unit == 2:
        return 4 if half else 8
    return 4 if rounding == SYMMETRIC or (rounding == AFFINE and not half) else 8


def linear(
    kind: int,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    zero: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    group_size: int = -1,
    scaler_size: int = 0,
    rounding: int = EXACT,
    otherwise: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32, in the dtype of ``x``.

    Args:
        kind: what the codes are.
        x: float32 or bfloat16 ``[..., K]``.
        codes: ``[N, K]`` bytes, or ``[N, ceil(K / 2)]`` of two codes.
        scale: float32 or bfloat16 ``[N, G]`` (``[1, 1]``: one for all), or uint8 with ``offset``.
        bias: float ``[N]`` or None.
        zero: float32, bfloat16 or uint8 ``[N, G]``, or None.
        offset: float32 ``[N, S]`` if the scale is ``(offset + code * step) ** 4``, else None.
        step: as ``offset``.
        group_size: columns to a scale; -1 for all.
        scaler_size: groups to an offset.
        rounding: of the activations.
        otherwise: what computes many rows where the processor has no unit for them; needed with rounding.
            Without it weights are decoded here and multiplied by torch.

    Raises:
        RuntimeError: the scales do not fit the columns of ``x``. The C code gets bare pointers.
        MemoryError: no room for a copy of the activations.
    """
    k, n = x.size(-1), codes.size(0)
    if scale.size(1) != (1 if group_size < 0 else -(-k // group_size)):
        raise RuntimeError(_wrong_groups(x, scale, group_size))
    rows = x.numel() // k
    out = x.new_empty(rows, n) if x.dim() == 2 else x.new_empty(*x.shape[:-1], n)
    if rows == 0:
        return out
    if bias is not None:
        bias = bias.contiguous() if bias.dtype in (torch.float32, torch.bfloat16) else bias.float()
    x, codes, scale = x.contiguous(), codes.contiguous(), scale.contiguous()
    if zero is not None:
        zero = zero.contiguous()
    if offset is not None and step is not None:
        offset, step = offset.contiguous(), step.contiguous()
    form = _TYPES[x.dtype]
    flags = (
        kind
        | (_TYPES[scale.dtype] if offset is None else _ROOT4) << 3
        | (0 if zero is None else _TYPES[zero.dtype]) << 6
        | form << 9
        | form << 11
        | (0 if bias is None else _TYPES[bias.dtype]) << 13
        | (scale.size(0) < n) << 15
        | rounding << 16
    )
    weight = (codes.data_ptr(), scale.data_ptr(), _pointer(zero), _pointer(offset), _pointer(step))
    unit, threads = native.best_unit(), torch.get_num_threads()
    status = native.loaded().linear(
        flags, x.data_ptr(), *weight, _pointer(bias), out.data_ptr(), rows, n, k, group_size, scaler_size,
        few_rows(form == 2, rounding, unit), unit, threads,
    )  # fmt: skip
    if status == _NO_UNIT and otherwise is not None:
        return otherwise()
    if status == _NO_UNIT:
        _decoded(x.view(rows, k), flags, weight, bias, out.view(rows, n), (group_size, scaler_size, threads))
    elif status:
        raise MemoryError("the native linear found no memory for a copy of the activations")
    return out


def _decoded(
    x: torch.Tensor,
    flags: int,
    weight: tuple[int | None, ...],
    bias: torch.Tensor | None,
    out: torch.Tensor,
    sizes: tuple[int, int, int],
) -> None:
    """Weight rows dequantized some at a time, multiplied by torch."""
    (_, k), n = x.shape, out.shape[1]
    part = x.new_empty(min(_ROWS_AT_ONCE, n), k)
    for start in range(0, n, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, n)
        if native.loaded().dequantize(flags, *weight, part.data_ptr(), start, stop, n, k, *sizes):
            raise MemoryError("the native linear found no memory for a row of weights")
        torch.mm(x, part[: stop - start].t(), out=out[:, start:stop])
    if bias is not None:
        out += bias


def _wrong_groups(x: torch.Tensor, scale: torch.Tensor, group_size: int) -> str:
    groups = 1 if group_size < 0 else -(-x.shape[-1] // group_size)
    return (
        f"an input {tuple(x.shape)} in groups of {group_size} columns needs {groups} scales a row, and the "
        f"weight has {scale.shape[1]}: it was quantized for another input size."
    )


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rejects(key: Key, weights: Callable[[Key], str]) -> str | None:
    """Why the library can't run here, or None.

    Args:
        key: of the call.
        weights: ``weights(key)`` says why the library can't read the weights; empty if it can.
    """
    if key.device.type != "cpu":
        return f"it runs on cpu, not on {key.device.type}"
    if key.dtype not in (torch.bfloat16, torch.float32):
        return f"it takes bfloat16 and float32 activations, not {key.dtype}"
    return weights(key) or native.unavailable()  # last: the first time, it compiles


Outline = tuple[torch.Size, torch.dtype]


def misfit(name: str, found: Outline | None, dtypes: tuple[torch.dtype, ...], *sizes: int | None) -> str:
    """Why a tensor is not what the C code reads, which gets bare pointers; empty if it is.

    Args:
        name: of the tensor, for the text.
        found: its shape and dtype; None for a missing one.
        dtypes: what it may be.
        *sizes: of each dimension; None for any but 0.
    """
    if found is None or found[1] not in dtypes:
        wanted = " or ".join(str(each).removeprefix("torch.") for each in dtypes)
        return f"it takes {name} in {wanted}, not {None if found is None else found[1]}"
    shape = found[0]
    fits = len(shape) == len(sizes) and all(
        have > 0 if need is None else have == need for have, need in zip(shape, sizes, strict=True)
    )
    if fits:
        return ""
    needed = ", ".join("any" if size is None else str(size) for size in sizes)
    return f"{name} {list(shape)} do not fit: [{needed}] is needed"


def bias_misfit(bias: Outline | None, rows: int) -> str:
    """The same for the bias ``[N]``, which may be missing."""
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return "" if bias is None else misfit("a bias", bias, floats, rows)
