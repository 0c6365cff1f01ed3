"""Rounding a few columns, each error handed on to those after it: by the scheme itself, or as an op.

What a scheme's codes stand for is looked up once for each row and group: a table of levels. Where they lie
at equal distances (integers) or are few (a code book), and the scheme rounds to the nearest, the op
``gptq_columns`` does the same as the scheme, and kernels can run it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ao_core import Op, QParams, Scheme, kernel_for

_MOST_LEVELS = 16  # of a code book: a kernel compares with each


@dataclass(frozen=True)
class Levels:
    """What a scheme's codes are.

    Attributes:
        low: the smallest code.
        count: how many there are, one after another.
        even: whether what they stand for lies at equal distances; else it only grows with the code.
        dtype: of the codes.
    """

    low: int
    count: int
    even: bool
    dtype: torch.dtype


@functools.lru_cache(maxsize=64)
def levels_of(scheme: Scheme) -> Levels | None:
    """The levels of a scheme that rounds to the nearest of evenly spaced or few ones; None of others.

    Found by trying: codes of the largest and smallest weights, what all between stand for, and whether
    random weights get the nearest.
    """
    columns = min(64 if scheme.group_columns == -1 else scheme.group_columns, 64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, columns, generator=generator)
    qparams = scheme.choose_qparams(weight)
    far = torch.full((8, 1), 1e4)
    low, high = scheme.encode(-far, qparams), scheme.encode(far, qparams)
    if low.dtype.is_floating_point or bool((low != low[0]).any()) or bool((high != high[0]).any()):
        return None
    first, last = int(low[0, 0]), int(high[0, 0])
    if not 2 <= last - first + 1 <= 256:
        return None
    codes = torch.arange(first, last + 1, dtype=low.dtype).expand(8, -1)
    table = torch.cat([scheme.decode(codes[:, i : i + 1], qparams) for i in range(codes.shape[1])], -1)
    steps = table.diff(dim=-1)
    if not bool(torch.isfinite(table).all()) or bool((steps <= 0).any()):
        return None
    even = bool(((steps - steps.mean(-1, keepdim=True)).abs() < 1e-2 * steps).all())
    if not even and codes.shape[1] > _MOST_LEVELS:
        return None
    values = (torch.rand(64, 8, columns, generator=generator) * 1.5 - 0.25) * (table[:, -1:] - table[:, :1])
    values += table[:, :1]
    nearest = (values.unsqueeze(-1) > ((table[:, 1:] + table[:, :-1]) / 2).unsqueeze(1)).sum(-1) + first
    found = torch.stack([scheme.encode(value, qparams) for value in values])
    same = (found.to(torch.int64) == nearest).double().mean()
    return Levels(first, codes.shape[1], even, low.dtype) if same > 0.999 else None


def accelerated(device: torch.device) -> bool:
    """Whether a kernel other than the reference runs ``gptq_columns`` there; on a CPU none is quicker."""
    if device.type == "cpu":
        return False
    args = next(iter(_samples(device)))
    return bool(kernel_for(GPTQ_COLUMNS, *args).provider != "reference")


def table_of(scheme: Scheme, qparams: QParams, levels: Levels) -> torch.Tensor:
    """What codes stand for: float32 ``[B, N, G, L]``; the lowest and the distance, L = 2, of even ones."""
    shape = next(iter(qparams.values())).shape  # [B, N, G]
    flat = {name: value.reshape(shape[0], -1, 1) for name, value in qparams.items()}

    def decoded(code: int) -> torch.Tensor:
        codes = torch.full(
            (shape[0], shape[1] * shape[2], 1), code, dtype=levels.dtype, device=flat[next(iter(flat))].device
        )
        return scheme.decode(codes, flat).view(*shape, 1)

    lowest, last = decoded(levels.low), levels.low + levels.count - 1
    if levels.even:
        return torch.cat([lowest, (decoded(last) - lowest) / (levels.count - 1)], -1)
    return torch.cat([lowest, *[decoded(code) for code in range(levels.low + 1, last + 1)]], -1)


def rounded(
    span: torch.Tensor, upper: torch.Tensor, table: torch.Tensor, groups: torch.Tensor, levels: Levels
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors of some columns, by the op ``gptq_columns``.

    Args:
        span: float32 ``[B, N, C]``.
        upper: the rows and columns of the factor that belong to them, ``[B, C, C]``.
        table: from :func:`table_of`.
        groups: int64 ``[B, C]``, the group of each column.
        levels: from :func:`levels_of`.
    """
    steps, errors = GPTQ_COLUMNS(
        span.contiguous(), upper.contiguous(), table, groups.to(torch.int32), levels.count
    )
    return (steps.to(torch.int32) + levels.low).to(levels.dtype), errors


def rounded_by_scheme(
    span: torch.Tensor,
    upper: torch.Tensor,
    scheme: Scheme,
    qparams: QParams,
    groups: torch.Tensor,
    zeros: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the scheme's own ``encode`` and ``decode``; ``qparams`` are ``[B, N, G]``.

    Where ``zeros``, bool ``[B, N, C]``, is True, the code is that of 0.
    """
    span = span.clone()
    errors, codes = torch.empty_like(span), []
    alone = len(span) == 1
    places = groups[0].tolist() if alone else []
    diagonal = upper.diagonal(dim1=1, dim2=2)  # [B, C]
    for i in range(span.shape[-1]):
        if alone:
            own = {name: value[..., places[i] : places[i] + 1] for name, value in qparams.items()}
        else:
            index = groups[:, i].view(-1, 1, 1)
            own = {
                name: value.gather(2, index.expand(-1, value.shape[1], 1)) for name, value in qparams.items()
            }
        value = span[..., i : i + 1]
        kept = value if zeros is None else value.masked_fill(zeros[..., i : i + 1], 0)
        code = scheme.encode(kept, own)
        codes.append(code)
        error = (value - scheme.decode(code, own)) / diagonal[:, i].view(-1, 1, 1)
        errors[..., i : i + 1] = error
        if alone:
            span[0, :, i + 1 :].addr_(error[0, :, 0], upper[0, i, i + 1 :], alpha=-1)
        else:
            span[..., i + 1 :].baddbmm_(error, upper[:, i : i + 1, i + 1 :], alpha=-1)
    return torch.cat(codes, -1), errors


def _reference(
    w: torch.Tensor, upper: torch.Tensor, table: torch.Tensor, groups: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    w = w.clone()
    steps, errors = torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(w)
    for i in range(w.shape[-1]):
        index = groups[:, i].long().view(-1, 1, 1, 1).expand(-1, w.shape[1], 1, table.shape[-1])
        own = table.gather(2, index).squeeze(2)  # [B, N, L]
        value = w[..., i]
        if table.shape[-1] == 2:
            step = ((value - own[..., 0]) / own[..., 1]).round().clamp(0, levels - 1)
            level = own[..., 0] + step * own[..., 1]
        else:
            step = (value.unsqueeze(-1) > (own[..., 1:] + own[..., :-1]) / 2).sum(-1)
            level = own.gather(-1, step.unsqueeze(-1)).squeeze(-1)
        error = (value - level) / upper[:, i, i].unsqueeze(-1)
        steps[..., i], errors[..., i] = step.to(torch.uint8), error
        w[..., i + 1 :] -= error.unsqueeze(-1) * upper[:, i : i + 1, i + 1 :]
    return steps, errors


def _fake(
    w: torch.Tensor, upper: torch.Tensor, table: torch.Tensor, groups: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(w)


def _samples(
    device: torch.device,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    for stack, rows, columns, groups, levels, width in (
        (1, 1, 1, 1, 2, 2),
        (1, 17, 63, 2, 16, 2),
        (2, 3, 33, 7, 16, 16),
        (1, 5, 17, 1, 256, 2),
        (3, 5, 16, 3, 3, 3),
    ):
        generator = torch.Generator().manual_seed(columns)
        w = torch.randn(stack, rows, columns, generator=generator)
        upper = torch.randn(stack, columns, columns, generator=generator).triu_() / columns
        upper.diagonal(dim1=1, dim2=2).abs_().add_(0.5)
        table = torch.rand(stack, rows, groups, width, generator=generator) + 0.1
        if width == 2:
            table[..., 0], table[..., 1] = -2, table[..., 1] * 4 / levels
        else:
            table = table.cumsum(-1) * 4 / width - 2
        place = torch.randint(groups, (stack, columns), generator=generator).to(torch.int32)
        yield w.to(device), upper.to(device), table.to(device), place.to(device), levels


GPTQ_COLUMNS = Op(
    "gptq_columns",
    "(Tensor w, Tensor upper, Tensor table, Tensor groups, int levels) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
)
"""Round columns ``w`` float32 ``[B, N, C]`` in order, and take each error out of those after it.

``upper`` ``[B, C, C]`` is that part of the inverse Hessian's factor; ``groups`` int32 ``[B, C]`` says which
of G tables a column uses; ``table`` is float32 ``[B, N, G, 2]``, the lowest of ``levels`` levels and their
distance, or ``[B, N, G, levels]``, growing. Returns how many levels above the lowest each weight became,
uint8 ``[B, N, C]``, and the errors over the factor's diagonal, float32 ``[B, N, C]``.
"""
