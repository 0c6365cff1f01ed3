"""Quantized weights: the base class, the classes that wrap another, and what torch's ops do to them."""

from __future__ import annotations

from ao_core.tensor import handlers as _handlers  # fills the tables that the base class looks into
from ao_core.tensor import sharding as _sharding  # and so does this
from ao_core.tensor.base import QuantizedTensor
from ao_core.tensor.wrappers import WRAPPERS, ConvWeight, InputScaledTensor, TransposedWeight

__all__ = ["WRAPPERS", "ConvWeight", "InputScaledTensor", "QuantizedTensor", "TransposedWeight"]

del _handlers, _sharding
