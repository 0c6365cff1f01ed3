"""2:4 matrices as what is kept: two values of each four columns, and where they stand.

Free functions. Columns that the last group of four lacks count as zeros. ``values`` ``[..., N, 2 G]`` with
G = ceil(K / 4); ``indices`` uint8 ``[..., N, ceil(G / 2)]`` has four bits a group, the even group in the low
ones: two bits for the column of the first value and two for that of the second, the first being less.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ao_core.numerics import pack


def compress(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``values`` and ``indices`` of a 2:4 matrix ``[..., N, K]`` of any dtype.

    Equal matrices give equal bytes: of a group with fewer than two non-zeros, zeros are kept.
    """
    groups = F.pad(weight, (0, -weight.shape[-1] % 4)).unflatten(-1, (-1, 4))  # [..., N, G, 4]
    n0, n1, n2, n3 = (groups != 0).unbind(-1)
    first = torch.where(n0, 0, torch.where(n1, 1, 2))
    last = torch.where(n3, 3, torch.where(n2, 2, 1))
    positions = torch.stack((first, torch.maximum(last, first + 1)), -1)  # [..., N, G, 2]
    values = groups.gather(-1, positions).flatten(-2)
    return values, pack.pack((positions[..., 0] | positions[..., 1] << 2).to(torch.uint8), bits=4)


def decompress(values: torch.Tensor, indices: torch.Tensor, columns: int) -> torch.Tensor:
    """The matrix ``[..., N, K]`` in the dtype of ``values``; the inverse of :func:`compress`."""
    codes = pack.unpack(indices, bits=4, columns=values.shape[-1] // 2)  # [..., N, G]
    positions = torch.stack((codes & 3, codes >> 2), -1).long()
    groups = values.new_zeros(*codes.shape, 4)
    groups.scatter_(-1, positions, values.unflatten(-1, (-1, 2)))
    return groups.flatten(-2)[..., :columns]
