"""The names of torchao's ``quantization`` and ``dtypes`` of April 2024, thin over ao's own.

For code that was written for torchao: change the import, keep the calls. Filters are
``filter_fn(module, name)``, as there. Unlike there, a model that is itself a ``nn.Linear`` is converted too,
tied weights stay tied, and nothing is converted in silence to something else: what can't be converted is
left alone with its reason in the returned report, or raises if that leaves nothing.
docs/migrating-from-torchao.md lists every name and what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ao_core import OptionError, Report, Scheme, model_bytes, quantize_, sqnr
from ao_quant import primitives
from ao_quant.int4 import Int4Tensor, Int4WeightOnly, Int8DynamicInt4Weight
from ao_quant.int8 import Int8Dynamic, Int8DynamicTensor, Int8Tensor, Int8WeightOnly
from ao_quant.int8_mm_ops import INT8_MM, INT8_SCALED_MM
from ao_quant.int_mm import check_int8
from ao_quant.nf4 import Nf4, Nf4Tensor
from ao_quant.pointwise import swap_conv2d_1x1_to_linear
from ao_quant.primitives import *  # noqa: F403 - they have torchao's names
from ao_quant.smoothing_linear import (
    SmoothFakeDynamicallyQuantizedLinear,
    get_scale,
    set_smooth_fq_attribute,
    smooth_fq_linear_to_inference,
    swap_linear_with_smooth_fq_linear,
)
from ao_quant.uint4 import UInt4, UInt4Tensor, UInt4WeightTensor

Filter = Callable[[nn.Module, str], bool]
M = TypeVar("M", bound=nn.Module)

NF4Tensor = Nf4Tensor


def change_linear_weights_to_int8_dqtensors(model: nn.Module, filter_fn: Filter | None = None) -> Report:
    """int8 weights and int8 activations: ``ao_core.quantize_(model, "int8-dynamic")``.

    By default linears of more than 16 input features, as torchao chooses.
    """
    return _convert(model, Int8Dynamic(), filter_fn or _has_many_columns)


def change_linear_weights_to_int8_woqtensors(model: nn.Module, filter_fn: Filter | None = None) -> Report:
    """int8 weights, float activations: ``ao_core.quantize_(model, "int8-weight-only")``."""
    return _convert(model, Int8WeightOnly(), filter_fn)


def change_linear_weights_to_int4_woqtensors(
    model: nn.Module, groupsize: int = 128, inner_k_tiles: int = 8, filter_fn: Filter | None = None
) -> Report:
    """4-bit weights in groups: ``ao_core.quantize_(model, "int4-weight-only", group_size=groupsize)``.

    Parameters span a group's whole range, as torchao's; ao's own default, ``qparams="mse"``, loses less.

    Args:
        model: any module.
        groupsize: 32, 64, 128 or 256.
        inner_k_tiles: 2, 4 or 8; the tiling that fits the weight is chosen all the same.
        filter_fn: which linears; all by default.
    """
    if inner_k_tiles not in (2, 4, 8):
        raise OptionError(f"inner_k_tiles is 2, 4 or 8, and {inner_k_tiles!r} was given.")
    return _convert(model, Int4WeightOnly(group_size=groupsize, qparams="minmax"), filter_fn)


def apply_dynamic_quant(model: nn.Module, filter_fn: Filter | None = None) -> Report:
    """The same as :func:`change_linear_weights_to_int8_dqtensors`."""
    return change_linear_weights_to_int8_dqtensors(model, filter_fn)


def apply_weight_only_int8_quant(model: nn.Module, filter_fn: Filter | None = None) -> Report:
    """The same as :func:`change_linear_weights_to_int8_woqtensors`: weights change, modules stay."""
    return change_linear_weights_to_int8_woqtensors(model, filter_fn)


def _has_many_columns(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and module.in_features > 16


def _convert(model: nn.Module, scheme: Scheme, filter_fn: Filter | None) -> Report:
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (filter_fn is None or filter_fn(module, name))
    ]
    return quantize_(model, scheme, include=[_literal(name) for name in names] or ["no linear was chosen"])


def _literal(name: str) -> str:
    """A pattern that matches ``name`` alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


class Int8DynamicallyQuantizedLinearWeight:
    """``from_float(weight)`` is ``Int8Dynamic().quantize(weight)``."""

    @classmethod
    def from_float(cls, input_float: Tensor) -> Tensor:
        """Quantize a weight ``[N, K]``."""
        return Int8Dynamic().quantize(input_float)


class Int8WeightOnlyQuantizedLinearWeight:
    """``from_float(weight)`` is ``Int8WeightOnly().quantize(weight)``."""

    @classmethod
    def from_float(cls, input_float: Tensor) -> Tensor:
        """Quantize a weight ``[N, K]``."""
        return Int8WeightOnly().quantize(input_float)


class Int4WeightOnlyQuantizedLinearWeight:
    """``from_float(weight, groupsize=128)`` is ``Int4WeightOnly(group_size=128).quantize(weight)``."""

    @classmethod
    def from_float(cls, input_float: Tensor, groupsize: int = 128, inner_k_tiles: int = 8) -> Tensor:
        """Quantize a weight ``[N, K]``; the tiling that fits is chosen whatever ``inner_k_tiles`` says."""
        return Int4WeightOnly(group_size=groupsize, qparams="minmax").quantize(input_float)


class PerChannelSymmetricWeightUInt4Tensor:
    """``from_float(weight)`` is ``UInt4().quantize(weight)``, which keeps negative weights."""

    @classmethod
    def from_float(cls, input_float: Tensor) -> Tensor:
        """Quantize a weight ``[N, K]``."""
        return UInt4().quantize(input_float)


class Int8DynActInt4WeightQuantizer:
    """8da4w: ``ao_core.quantize_(model, "int8-dynamic-int4-weight", group_size=groupsize)``.

    Args:
        groupsize: 32, 64, 128 or 256. Linears whose input features it does not divide are padded inside
            the tensor, whatever ``padding_allowed`` says.
        padding_allowed: taken, and not needed.
        precision: taken; the weight's own dtype is kept.
        scales_precision: taken; scales are float32 for float32 weights, else bfloat16.
    """

    def __init__(
        self,
        groupsize: int = 256,
        padding_allowed: bool = False,
        precision: torch.dtype = torch.float32,
        scales_precision: torch.dtype = torch.float32,
    ) -> None:
        self.scheme = Int8DynamicInt4Weight(group_size=groupsize, qparams="minmax")

    def quantize(self, model: M) -> M:
        """Quantize ``model`` in place, and return it."""
        _convert(model, self.scheme, None)
        return model


class Int4WeightOnlyQuantizer:
    """``ao_core.quantize_(model, "int4-weight-only", group_size=groupsize)``; biases are kept.

    Args:
        groupsize: 32, 64, 128 or 256.
        padding_allowed: taken, and not needed: see :class:`Int8DynActInt4WeightQuantizer`.
        inner_k_tiles: taken: the tiling that fits is chosen.
    """

    def __init__(self, groupsize: int = 256, padding_allowed: bool = True, inner_k_tiles: int = 8) -> None:
        self.scheme = Int4WeightOnly(group_size=groupsize, qparams="minmax")

    def quantize(self, model: M) -> M:
        """Quantize ``model`` in place, and return it."""
        _convert(model, self.scheme, None)
        return model


def to_nf4(tensor: Tensor, block_size: int = 64, scaler_block_size: int = 256) -> Tensor:
    """NF4 with double quantization: ``Nf4(...).quantize(tensor)`` for any number of elements.

    Args:
        tensor: float ``[..., N, K]``.
        block_size: columns to a block; the last block of a row may be shorter.
        scaler_block_size: blocks that share a scale of their own scales.
    """
    return Nf4(block_size=block_size, scaler_block_size=scaler_block_size).quantize(tensor)


def linear_nf4(input: Tensor, weight: Tensor) -> Tensor:  # noqa: A002 - torchao's name
    """``F.linear(input, weight)``: an NF4 weight has its gradient for the input by itself."""
    return F.linear(input, weight)


def compute_error(x: Tensor, y: Tensor) -> Tensor:
    """Signal-to-quantization-noise ratio of ``y`` against ``x`` in dB, a scalar: ``ao_core.sqnr``."""
    return torch.tensor(sqnr(x, y))


def get_model_size_in_bytes(model: nn.Module) -> int:
    """Bytes that the parameters and buffers really take: ``ao_core.model_bytes(model).total``."""
    return model_bytes(model).total


def safe_int_mm(input: Tensor, mat2: Tensor) -> Tensor:  # noqa: A002 - torchao's name
    """``input @ mat2`` of int8 matrices, int32, exact, where they are."""
    check_int8(input, mat2)
    out: Tensor = INT8_MM(input, mat2)
    return out


int_matmul = safe_int_mm


def int_scaled_matmul(a: Tensor, b: Tensor, scales1: Tensor) -> Tensor:
    """``(a @ b) * scales1`` of int8 matrices, scaled in float32, in the dtype of ``scales1``.

    Args:
        a: int8 ``[M, K]``, any K.
        b: int8 ``[K, N]``.
        scales1: float ``[M, 1]``.

    Raises:
        TypeError: an operand is not int8.
        ValueError: sizes that do not fit, or operands on two devices.
    """
    check_int8(a, b)
    if scales1.shape != (a.shape[0], 1) or not scales1.is_floating_point():
        raise ValueError(
            f"int_scaled_matmul takes float scales of rows [{a.shape[0]}, 1], and was given {scales1.dtype} "
            f"{list(scales1.shape)}. Pass one scale for each row of a, as a column."
        )
    out: Tensor = INT8_SCALED_MM(a, b, scales1.squeeze(1), None, None, scales1.dtype)
    return out


__all__ = [
    "Int4Tensor",
    "Int4WeightOnlyQuantizedLinearWeight",
    "Int4WeightOnlyQuantizer",
    "Int8DynActInt4WeightQuantizer",
    "Int8DynamicTensor",
    "Int8DynamicallyQuantizedLinearWeight",
    "Int8Tensor",
    "Int8WeightOnlyQuantizedLinearWeight",
    "NF4Tensor",
    "PerChannelSymmetricWeightUInt4Tensor",
    "SmoothFakeDynamicallyQuantizedLinear",
    "UInt4Tensor",
    "UInt4WeightTensor",
    "apply_dynamic_quant",
    "apply_weight_only_int8_quant",
    "change_linear_weights_to_int4_woqtensors",
    "change_linear_weights_to_int8_dqtensors",
    "change_linear_weights_to_int8_woqtensors",
    "compute_error",
    "get_model_size_in_bytes",
    "get_scale",
    "int_matmul",
    "int_scaled_matmul",
    "linear_nf4",
    "safe_int_mm",
    "set_smooth_fq_attribute",
    "smooth_fq_linear_to_inference",
    "swap_conv2d_1x1_to_linear",
    "swap_linear_with_smooth_fq_linear",
    "to_nf4",
]
__all__ += primitives.__all__
