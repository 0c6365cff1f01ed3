"""Weights of -1, 0 and 1, four to a byte, one scale a row (BitNet b1.58, arXiv 2402.17764, eq. 1-3)."""

from dataclasses import dataclass

import torch

import ao_core as ao
from ao_core.numerics import pack


class TernaryTensor(ao.QuantizedTensor):
    data_names = ("packed", "scale")

    def dequantize(self):
        codes = pack.unpack(self.packed, bits=2, columns=self.shape[-1]).float() - 1
        return (codes * self.scale).to(self.dtype)


@dataclass(frozen=True)
class Ternary(ao.Scheme):
    name, tensor_types, min_sqnr = "ternary", (TernaryTensor,), 5.5
    summary = "weights of -1, 0 and 1, four to a byte"

    def choose_qparams(self, weight):
        return {"scale": weight.float().abs().mean(-1, keepdim=True).clamp_min(1e-12)}

    def encode(self, weight, qparams):
        return (weight.float() / qparams["scale"]).round().clamp(-1, 1).to(torch.int8)

    def decode(self, codes, qparams):
        return codes.float() * qparams["scale"]

    def pack(self, codes, qparams, *, dtype):
        packed = pack.pack(codes + 1, bits=2)
        return TernaryTensor(packed, qparams["scale"], shape=codes.shape, dtype=dtype)


@ao.hookimpl
def ao_register_schemes():
    return [Ternary]
