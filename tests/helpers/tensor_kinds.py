"""Small quantized tensors, a stranger's too."""

from __future__ import annotations

import math

import torch
from torch import nn

import ao_core as ao

N, K = 17, 63


class StepTensor(ao.QuantizedTensor):
    """``codes * step``: exact in every float dtype, so that results can be compared bit for bit."""

    data_names = ("codes", "extra")
    attr_names = ("step",)
    row_data = ("codes",)

    def dequantize(self):
        return self.codes.to(self.dtype) * self.step


class RowTensor(ao.QuantizedTensor):
    """One scale a row; everything that is stored is cut along with the rows."""

    data_names = ("codes", "scale")

    def dequantize(self):
        return (self.codes.float() * self.scale).to(self.dtype)


def step_tensor(*shape, step=0.5, extra=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    return StepTensor(codes, extra, shape=shape, dtype=dtype, step=step, scheme="steps")


def row_tensor(*shape, seed=0):
    codes = step_tensor(*shape, seed=seed).codes
    scale = torch.arange(1, 1 + math.prod(shape[:-1])).view(*shape[:-1], 1) / 64
    return RowTensor(codes, scale, shape=shape, dtype=torch.float32)


def whole(*shape, seed=1):
    """Small whole numbers as float32: products and sums are exact."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def linear_of(weight, *, bias=True):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias:
        module.bias.data.copy_(whole(weight.shape[0], seed=9))
    return module


def exact(x, weight, bias=None):
    """``F.linear`` in float64 on the codes themselves."""
    out = x.double() @ (weight.codes.double() * weight.step).t()
    return out if bias is None else out + bias.double()
