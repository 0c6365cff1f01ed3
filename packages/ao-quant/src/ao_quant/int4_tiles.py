"""4-bit weights in the tiles of torch's own int4 kernels, and the linear that runs on them.

Tilings, by name:

``tinygemm`` (CUDA): int32 ``[N / 8, K / (16 t), 32, t / 2]`` with t = 2, 4 or 8 tiles of 16 columns in
a row of tiles; what ``torch._convert_weight_to_int4pack`` makes. ``cpu-AVX512`` and ``cpu-AVX2``: uint8
``[N / b, K, b / 2]`` with blocks of b = 64 or 32 rows, as ``..._for_cpu`` makes on such a processor.

Tiling is done here, by torch's operators, so that tiles can be undone on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ao_core import Kernel, Key, Op, kernel_for
from ao_core.numerics import pack
from ao_quant import ranges
from ao_quant.decoded import linear_by_rows, linear_float32
from ao_quant.int4_ops import INT4_WEIGHT_LINEAR
from ao_quant.ranges import MIDDLE, ZeroPoint

if TYPE_CHECKING:
    from ao_quant.int4 import Int4Tensor

_GROUP_SIZES = (32, 64, 128, 256)
_BLOCK = {"tinygemm": 8, "cpu-AVX512": 64, "cpu-AVX2": 32}  # rows that a tile holds
# Up to so many rows torch's kernel is used; above, the weight is dequantized and multiplied in float. H100,
# 4096×4096: 79 µs at 64 rows, and twice that at twice as many; dequantizing takes 530 µs.
_FEW = {"cuda": 256, "cpu": 4}
_ROWS_AT_ONCE = 4096  # tiled at a time: a multiple of every block


def tiling_for(weight: Int4Tensor) -> str | None:
    """The tiling that torch's kernel wants of ``weight`` where it lies, if that kernel is the one to use.

    None where torch has no kernel for it, or where an installed kernel takes the plain layout.
    """
    plain = type(weight.packed) is Tensor and weight.ndim == 2 and weight.group_size in _GROUP_SIZES
    if not plain or weight.provider not in (None, "torch"):
        return None
    tiling = _torch_tiling(weight.device, weight.dtype)
    if tiling is None or weight.scale.dtype != weight.dtype:  # torch takes parameters of that dtype only
        return None
    x = weight.packed.new_empty(0, weight.shape[1], dtype=weight.dtype)
    args = (x, weight.packed, weight.scale, weight.zero, None, weight.group_size)
    return tiling if kernel_for(INT4_WEIGHT_LINEAR, *args).provider == "torch" else None


def _torch_tiling(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return "tinygemm" if modern and dtype == torch.bfloat16 else None
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32):
        tiling = f"cpu-{torch.backends.cpu.get_cpu_capability()}"
        return tiling if tiling in _BLOCK else None
    return None


def tile(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, tiling: str
) -> tuple[Tensor, Tensor]:
    """Tiles and ``scale_and_zero`` of plain codes; rows and columns are filled up to whole tiles.

    Args:
        codes: uint8 ``[N, K]`` in [0, 15].
        scale: float ``[N, G]``.
        zero: None, midpoints of that dtype, or uint8 zero points ``[N, G]``.
        group_size: 32, 64, 128 or 256.
        tiling: see the module.

    Returns:
        ``(tiles, scale_and_zero)``; the latter in the dtype of ``scale``, ``[G, N, 2]`` with N filled up.
    """
    (n, k), groups = codes.shape, scale.shape[1]
    more_rows = -n % _BLOCK[tiling]
    if zero is None:
        middle = torch.zeros_like(scale)
    elif zero.is_floating_point():
        middle = zero
    else:  # (q - zero) * scale == (q - 8) * scale + (8 - zero) * scale
        middle = ((MIDDLE - zero.float()) * scale.float()).to(scale.dtype)
    both = F.pad(torch.stack((scale, middle), -1), (0, 0, 0, 0, 0, more_rows))  # [N, G, 2]
    filled = F.pad(codes, (0, groups * group_size - k, 0, more_rows), value=MIDDLE)
    tiles = _tinygemm(filled) if tiling == "tinygemm" else _cpu(filled, _BLOCK[tiling])
    return tiles, both.transpose(0, 1).contiguous()


def untile(
    tiles: Tensor,
    scale_and_zero: Tensor,
    shape: tuple[int, ...],
    group_size: int,
    zero_point: ZeroPoint,
    tiling: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of :func:`tile`: codes, scale and zero, exact, on whatever device the tiles lie."""
    n, k = shape
    columns = scale_and_zero.shape[0] * group_size
    codes = _from_tinygemm(tiles) if tiling == "tinygemm" else _from_cpu(tiles, _BLOCK[tiling], columns)
    scale, middle = (part[:n].contiguous() for part in scale_and_zero.transpose(0, 1).unbind(-1))
    zero: Tensor | None = middle
    if zero_point is None:
        zero = None
    elif zero_point == "integer":  # the midpoint was rounded by at most 2 ** -9 of 8 steps
        zero = (MIDDLE - middle.float() / scale.float()).round_().clamp_(0, 15).to(torch.uint8)
    return codes[:n, :k].contiguous(), scale, zero


def tile_packed(
    packed: Tensor, scale: Tensor, zero: Tensor | None, columns: int, group_size: int, tiling: str
) -> tuple[Tensor, Tensor]:
    """:func:`tile` for codes packed two to a byte ``[N, ceil(K / 2)]``, some rows at a time."""
    n, made = packed.shape[0], []
    tiles, filled = None, 0
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        codes = pack.unpack(packed[rows], bits=4, columns=columns)
        some, both = tile(codes, scale[rows], None if zero is None else zero[rows], group_size, tiling)
        if tiles is None:  # all at once and not joined in the end, which would hold them twice
            rows_a_tile = both.shape[1] // some.shape[0]
            whole = -(-n // _BLOCK[tiling]) * _BLOCK[tiling] // rows_a_tile
            tiles = some.new_empty(whole, *some.shape[1:])
        tiles[filled : filled + some.shape[0]] = some
        filled += some.shape[0]
        made.append(both)
    assert tiles is not None  # a weight has rows
    return tiles, torch.cat(made, 1)


def untile_packed(
    tiles: Tensor,
    scale_and_zero: Tensor,
    shape: tuple[int, int],
    group_size: int,
    zero_point: ZeroPoint,
    tiling: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of :func:`tile_packed`."""
    n, k = shape
    rows_a_tile = scale_and_zero.shape[1] // tiles.shape[0]
    parts = []
    for start in range(0, n, _ROWS_AT_ONCE):
        stop = start + _ROWS_AT_ONCE
        some, both = tiles[start // rows_a_tile : stop // rows_a_tile], scale_and_zero[:, start:stop]
        rows = (min(n, stop) - start, k)
        codes, scale, zero = untile(some, both, rows, group_size, zero_point, tiling)
        parts.append((pack.pack(codes, bits=4), scale, zero))
    zeros = [zero for _, _, zero in parts if zero is not None]
    return (
        torch.cat([packed for packed, _, _ in parts]),
        torch.cat([scale for _, scale, _ in parts]),
        torch.cat(zeros) if zeros else None,
    )


def take_rows(
    tiles: Tensor, scale_and_zero: Tensor, index: Tensor, tiling: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles that hold rows ``index`` ``[R]``, one each, and where in what they untile to a row is.

    Returns:
        ``(tiles, scale_and_zero, position)`` of a weight of R whole tiles; position int64 ``[R]``.
    """
    block, count = _BLOCK[tiling], index.shape[0]
    index = index.long()
    whole = tiles.reshape(scale_and_zero.shape[1] // block, -1)[index // block]
    per_tile = tiles.shape[0] * block // scale_and_zero.shape[1]
    inside = torch.arange(block, device=index.device)
    rows = ((index // block * block).unsqueeze(1) + inside).flatten()
    position = torch.arange(count, device=index.device) * block + index % block
    return whole.reshape(count * per_tile, *tiles.shape[1:]), scale_and_zero[:, rows], position


def _tinygemm(codes: Tensor) -> Tensor:
    """``[N, K]`` to int32 tiles: a lane of 32 holds one row and, of 16 columns, two pairs 8 apart."""
    n, k = codes.shape
    tiles = next(t for t in (8, 4, 2) if k % (16 * t) == 0)
    # row tile, row, column tiles, pair of tiles, tile of the pair, half, pair of columns, column
    parts = codes.view(n // 8, 8, k // (16 * tiles), tiles // 2, 2, 2, 4, 2)
    nibbles = parts.permute(0, 2, 1, 6, 3, 7, 4, 5).reshape(n // 8, k // (16 * tiles), 32, tiles // 2, 8)
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32).squeeze(-1)


def _from_tinygemm(tiles: Tensor) -> Tensor:
    row_tiles, column_tiles, _, pairs = tiles.shape
    packed = tiles.unsqueeze(-1).contiguous().view(torch.uint8)  # [..., 4]
    nibbles = torch.stack((packed & 15, packed >> 4), -1)
    parts = nibbles.reshape(row_tiles, column_tiles, 8, 4, pairs, 2, 2, 2)
    return parts.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(row_tiles * 8, column_tiles * pairs * 32)


def _cpu(codes: Tensor, block: int) -> Tensor:
    """``[N, K]`` to uint8 ``[N / b, K, b / 2]``: the upper half of a block's rows in the high four bits."""
    low, high = codes.view(-1, 2, block // 2, codes.shape[1]).unbind(1)  # [N / b, b / 2, K]
    tiles: Tensor = (low | high << 4).transpose(1, 2).contiguous()
    return tiles.view(codes.shape[0], codes.shape[1] // 2)


def _from_cpu(tiles: Tensor, block: int, columns: int) -> Tensor:
    parts = tiles.view(-1, columns, block // 2).transpose(1, 2)
    return torch.stack((parts & 15, parts >> 4), 1).reshape(-1, columns)


def _dequantized(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, rows: int, options: tuple[Any, ...], dtype: torch.dtype
) -> Tensor:
    """The weight ``[N, K]`` in ``dtype``."""
    group_size, zero_point, tiling = options
    shape = (rows, x.shape[-1])
    codes, scale, zero = untile(tiles, scale_and_zero, shape, group_size, zero_point, tiling)
    return ranges.decode(codes, *ranges.by_column(scale, zero, shape[1], group_size)).to(dtype)


def tiled_linear_reference(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None,
    rows: int,
    group_size: int,
    zero_point: ZeroPoint,
    tiling: str,
) -> Tensor:
    """``x @ weight.T + bias`` in float32, cast to the dtype of ``x`` once.

    Args:
        x: float ``[..., K]``.
        tiles: see the module.
        scale_and_zero: float ``[G, N, 2]``, N filled up to whole tiles.
        bias: float ``[N]`` or None.
        rows: N.
        group_size: columns to a scale.
        zero_point: what the midpoints stand for.
        tiling: of the tiles.
    """
    options = (group_size, zero_point, tiling)
    weight = _dequantized(x, tiles, scale_and_zero, rows, options, torch.float32)
    return linear_float32(x, weight, bias)


def tiled_linear_torch(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    bias: Tensor | None,
    rows: int,
    group_size: int,
    zero_point: ZeroPoint,
    tiling: str,
) -> Tensor:
    """Torch's int4 kernel for few rows of ``x``, its float matmul on the dequantized weight above."""
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    if not 0 < flat.shape[0] <= _FEW[x.device.type]:
        options = (group_size, zero_point, tiling)
        weight = _dequantized(x, tiles, scale_and_zero, rows, options, x.dtype)
        return linear_by_rows(x, rows, bias, lambda part: weight[part])
    flat = F.pad(flat, (0, scale_and_zero.shape[0] * group_size - x.shape[-1])).contiguous()
    if tiling == "tinygemm":
        out = torch._weight_int4pack_mm(flat, tiles, group_size, scale_and_zero)
    else:
        out = torch._weight_int4pack_mm_for_cpu(flat, tiles, group_size, scale_and_zero)
    out = out[:, :rows].reshape(*x.shape[:-1], rows)
    return out if bias is None else out + bias.to(x.dtype)


def _fake(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, bias: Tensor | None, rows: int, *_: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _rejects(key: Key) -> str | None:
    tiling = key.options[-1]
    wanted = _torch_tiling(key.device, key.dtype)
    if tiling != wanted:
        return f"torch's kernel takes {wanted or 'no'} tiles on {key.device} in {key.dtype}, not {tiling}"
    return None


def tiled_linear_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``int4_tiled_linear`` in awkward sizes, for the tiling of ``device``."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        tiling = _torch_tiling(device, dtype)
        sizes = [(1, 576, 192, 128), (3, 100, 17, 32), (17, 63, 1, 64), (70, 512, 40, 256), (0, 64, 8, 32)]
        for index, (rows, k, n, group_size) in enumerate(sizes if tiling else []):
            groups = -(-k // group_size)
            x = torch.randn(rows, k, generator=generator).to(dtype)
            codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
            scale = (torch.rand(n, groups, generator=generator) / 10 + 0.01).to(dtype)
            midpoint = (torch.randn(n, groups, generator=generator) / 10).to(dtype)
            tiles, both = tile(codes, scale, midpoint if index % 2 else None, group_size, str(tiling))
            bias = torch.randn(n, generator=generator).to(dtype) if rows % 2 else None
            parts = [None if part is None else part.to(device) for part in (x, tiles, both, bias)]
            yield (*parts, n, group_size, "float" if index % 2 else None, tiling)


INT4_TILED_LINEAR = Op(
    "int4_tiled_linear",
    "(Tensor x, Tensor tiles, Tensor scale_and_zero, Tensor? bias, int rows, int group_size, "
    "str? zero_point, str tiling) -> Tensor",
    reference=tiled_linear_reference,
    fake=_fake,
    samples=tiled_linear_samples,
)

KERNELS = [Kernel("int4_tiled_linear", "torch", tiled_linear_torch, rejects=_rejects)]
