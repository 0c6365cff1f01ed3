"""NF4 weights: 16 levels at the quantiles of a normal distribution, scaled by block (arXiv:2305.14314).

With double quantization a block's absmax is stored in a byte, as a code of its fourth root. The absmax of
blocks differ by orders of magnitude where a row holds outliers, and their fourth roots far less: beside an
outlier 1000 times larger a block's absmax is off by 4 % at most and by 2 % in the mean, where codes spaced
evenly would give all other blocks the same one. Undoing the root takes two multiplications.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F

from ao_core import OptionError, QParams, QuantizedTensor, Scheme
from ao_core.numerics import affine, codebook, pack
from ao_quant.experts_ops import NF4_EXPERTS_LINEAR
from ao_quant.nf4_ops import NF4_DEQUANTIZE, NF4_LINEAR, block_absmax, dequantize_reference, nf4_levels
from ao_quant.ranges import total

# The largest root whose fourth power float32 holds, less some steps that rounding may take up.
_LARGEST_ROOT = 2.0**32 * (1 - 2.0**-20)
Range = Literal["absmax", "mse"]
# What a block's absmax is multiplied by in the search for the least squared error: 0.70 to 1.04.
_FACTORS = tuple(factor / 100 for factor in range(70, 106, 2))
# Elements encoded or packed at a time: a few MB of temporary tensors, however large the weight is.
_ELEMENTS = 1 << 18


class Nf4Tensor(QuantizedTensor):
    """Two codes a byte, ``uint8 [..., N, ceil(K / 2)]``, the even column in the low four bits.

    ``absmax`` is float32 ``[..., N, G]``, G = ceil(K / block_size), and ``offset`` and ``step`` are None; or
    ``absmax`` is uint8, and they are float32 ``[..., N, ceil(G / scaler_block_size)]``: see
    :func:`~ao_quant.nf4_ops.block_absmax`.
    """

    data_names = ("packed", "absmax", "offset", "step")
    attr_names = ("block_size", "scaler_block_size")

    packed: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor | None
    step: torch.Tensor | None
    block_size: int
    scaler_block_size: int

    def dequantize(self) -> torch.Tensor:
        """``level * absmax`` in float32, cast to the outer dtype: by ``ao::nf4_dequantize`` on CUDA.

        Elsewhere there is no kernel for it, and torch's operators can be compiled into their surroundings.
        """
        run = NF4_DEQUANTIZE if self.device.type == "cuda" else dequantize_reference
        out: torch.Tensor = run(
            self.packed, self.absmax, self.offset, self.step,
            self.shape[-1], self.block_size, self.scaler_block_size, self.dtype,
        )  # fmt: skip
        return out

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::nf4_linear``.

        Raises:
            RuntimeError: an input of other than K features.
        """
        if x.shape[-1] != self.shape[-1]:  # an odd K leaves half a byte, which the op can't tell from K + 1
            raise RuntimeError(
                f"a linear with {self.shape[-1]} input features was given an input {tuple(x.shape)}; "
                "its last dimension must match."
            )
        out: torch.Tensor = NF4_LINEAR(
            x, self.packed, self.absmax, self.offset, self.step, bias,
            self.block_size, self.scaler_block_size, provider=self.provider,
        )  # fmt: skip
        return out

    def grouped_linear(self, x: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        """One call of ``ao::nf4_experts_linear``."""
        out: torch.Tensor = NF4_EXPERTS_LINEAR(
            x, offsets, self.packed, self.absmax, self.offset, self.step,
            self.block_size, self.scaler_block_size, provider=self.provider,
        )  # fmt: skip
        return out


@dataclass(frozen=True)
class Nf4(Scheme):
    """4-bit normal-float weights in blocks, float activations: the frozen weights of QLoRA.

    Attributes:
        block_size: columns that share an absmax; the last block of a row may be shorter.
        double_quant: store each absmax in a byte instead of in float32.
        scaler_block_size: blocks of a row that share the offset and step of these bytes.
        qparams: ``"absmax"``, as QLoRA and bitsandbytes have it: the largest weight of a block gets the
            outermost level. ``"mse"``: what takes its place has the least squared error of some multiples of
            it, about 14 % less for normal weights.
    """

    name: ClassVar[str] = "nf4"
    version: ClassVar[int] = 1
    tensor_types = (Nf4Tensor,)
    min_sqnr: ClassVar[float] = 20.0
    rowwise: ClassVar[bool] = True
    summary: ClassVar[str] = "4-bit normal-float weights in blocks of 64 (QLoRA); float activations"

    block_size: int = 64
    double_quant: bool = True
    scaler_block_size: int = 256
    qparams: Range = "absmax"

    def __post_init__(self) -> None:
        for option in ("block_size", "scaler_block_size"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{self.name} takes {option} 1 or more, and was given {value!r}.")
        if not isinstance(self.double_quant, bool):
            raise OptionError(
                f"{self.name} takes double_quant true or false, and was given {self.double_quant!r}."
            )
        if self.qparams not in get_args(Range):
            raise OptionError(f"{self.name} takes qparams 'absmax' or 'mse', and was given {self.qparams!r}.")

    @property
    def group_columns(self) -> int:
        """See :class:`~ao_core.Scheme`."""
        return self.block_size

    def choose_qparams(self, weight: torch.Tensor) -> QParams:
        """``absmax`` float32 ``[..., N, G]``: with double quantization, as it will be read back.

        :meth:`pack` finds the bytes of these values again. Those of groups that were chosen alone lie on
        grids of their own, and are rounded to the row's then.
        """
        absmax = largest_of_blocks(weight, self.block_size)
        if self.qparams == "mse":
            absmax = _least_squares(weight, absmax, self.block_size)
        if self.double_quant:
            stored = compress_absmax(absmax, self.scaler_block_size)
            absmax = block_absmax(*stored, scaler_block_size=self.scaler_block_size)
        return {"absmax": absmax}

    def encode(self, weight: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """The nearest level of each ``weight / absmax``, uint8 ``[..., N, C]``; zeros get level 0."""
        flat = weight.reshape(-1, weight.shape[-1])  # [R, C]
        absmax = qparams["absmax"].flatten(0, -2)  # [R, G]
        codes = torch.empty(flat.shape, dtype=torch.uint8, device=weight.device)
        for rows in _parts(flat):
            codes[rows] = _encode(flat[rows], absmax[rows], self.block_size)
        return codes.view(weight.shape)

    def decode(self, codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
        """``level * absmax``, float32."""
        return _decode(codes, qparams["absmax"], self.block_size)

    def pack(self, codes: torch.Tensor, qparams: QParams, *, dtype: torch.dtype) -> Nf4Tensor:
        """Codes in half bytes, and the absmax in bytes with double quantization."""
        stored: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] = (
            compress_absmax(qparams["absmax"], self.scaler_block_size)
            if self.double_quant
            else (qparams["absmax"], None, None)
        )
        flat = codes.reshape(-1, codes.shape[-1])  # [R, K]
        packed = flat.new_empty(flat.shape[0], -(-codes.shape[-1] // 2), dtype=torch.uint8)
        for rows in _parts(flat):
            packed[rows] = pack.pack(flat[rows], bits=4)
        return Nf4Tensor(
            packed.view(*codes.shape[:-1], -1), *stored, shape=codes.shape, dtype=dtype,
            block_size=self.block_size, scaler_block_size=self.scaler_block_size,
        )  # fmt: skip


def _encode(weight: torch.Tensor, absmax: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[R, C]`` by ``[R, G]``. Where absmax is zero its weights are: any divisor keeps them."""
    divisor = absmax.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = weight.float() / affine.expand_groups(divisor, weight.shape[-1], block_size)
    return codebook.encode(scaled, nf4_levels(weight))


def _decode(codes: torch.Tensor, absmax: torch.Tensor, block_size: int) -> torch.Tensor:
    scale = affine.expand_groups(absmax, codes.shape[-1], block_size)
    return codebook.decode(codes, nf4_levels(codes)).mul_(scale)


def _least_squares(weight: torch.Tensor, absmax: torch.Tensor, block_size: int) -> torch.Tensor:
    """The multiple of each block's absmax ``[..., N, G]`` that leaves the least squared error."""
    flat, best = weight.reshape(-1, weight.shape[-1]), absmax.flatten(0, -2).clone()
    whole = -(-flat.shape[1] // block_size) * block_size
    for rows in _parts(flat):
        part, full = flat[rows].float(), best[rows]
        found, least = full.clone(), torch.full_like(full, torch.inf)
        for factor in (1.0, *_FACTORS):
            trial = full * factor
            error = _decode(_encode(part, trial, block_size), trial, block_size).sub_(part).square_()
            power = total(F.pad(error, (0, whole - error.shape[1])).unflatten(1, (-1, block_size)))
            wins = power < least
            found, least = torch.where(wins, trial, found), torch.where(wins, power, least)
        best[rows] = found
    return best.view(absmax.shape)


def _parts(flat: torch.Tensor) -> Iterator[slice]:
    rows = max(_ELEMENTS // flat.shape[1], 1)
    return (slice(start, start + rows) for start in range(0, flat.shape[0], rows))


def largest_of_blocks(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """The largest magnitude of each block of columns: float ``[..., N, K]`` → float32 ``[..., N, G]``."""
    whole = weight.shape[-1] // block_size * block_size
    blocks = weight[..., :whole].unflatten(-1, (-1, block_size))  # [..., N, K // block_size, block_size]
    # Two bounds and not the maximum of abs(), which would be a copy of the weight.
    parts = [torch.maximum(blocks.amax(-1), -blocks.amin(-1))] if whole else []
    if whole < weight.shape[-1]:
        rest = weight[..., whole:]
        parts.append(torch.maximum(rest.amax(-1, keepdim=True), -rest.amin(-1, keepdim=True)))
    return torch.cat(parts, -1).float()


def compress_absmax(
    absmax: torch.Tensor, scaler_block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization: codes of the fourth roots, spread evenly between the smallest and the largest.

    Values that were read back from such codes get the same ones, up to rounding in float32.

    Args:
        absmax: float32 ``[..., N, G]``, not negative. Zeros take no part in the range, so that an empty block
            does not coarsen the others; they are read back as the smallest.
        scaler_block_size: neighbouring blocks of a row that share an offset and a step.

    Returns:
        ``(codes, offset, step)``: uint8 ``[..., N, G]``, two float32 ``[..., N, S]``,
        S = ceil(G / scaler_block_size), with ``absmax ≈ (offset + codes * step) ** 4``.
    """
    roots = absmax.double().sqrt().sqrt().clamp_max(_LARGEST_ROOT)  # [..., N, G]
    blocks = roots.shape[-1]
    size = min(scaler_block_size, blocks)
    more = -blocks % size
    filled = torch.cat((roots, roots[..., -1:].expand(*roots.shape[:-1], more)), -1)
    grouped = filled.unflatten(-1, (-1, size))  # [..., N, S, size]
    high = grouped.amax(-1)
    low = torch.where(grouped > 0, grouped, high.unsqueeze(-1)).amin(-1)
    offset, step = low.float(), ((high - low) / 255).float()
    above = grouped - low.unsqueeze(-1)
    spread = step.double().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    codes = (above / spread).round_().clamp_(0, 255)
    return codes.to(torch.uint8).flatten(-2)[..., :blocks].contiguous(), offset, step
