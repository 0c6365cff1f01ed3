"""A scheme and a kernel that are right, for the conformance kit to pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

import ao_core as ao
from ao_core import registry
from ao_core.kernels import KERNELS, clear_choices
from ao_core.ops import OPS
from ao_core.scheme import SCHEMES

SOURCE = registry.Source("tests", "tests", "1")
CPU = torch.device("cpu")


class RightTensor(ao.QuantizedTensor):
    data_names = ("codes", "scale")
    attr_names = ("levels", "block")

    def dequantize(self):
        return (self.codes.float() * self.scale).to(self.dtype)


@dataclass(frozen=True)
class Right(ao.Scheme):
    """Symmetric int8, one scale a row, written without ao_core.numerics."""

    name: ClassVar[str] = "right"
    tensor_types = (RightTensor,)
    min_sqnr: ClassVar[float] = 40.0

    levels: int = 127
    block: tuple[int, int] = (1, -1)

    def choose_qparams(self, weight):
        largest = weight.float().abs().amax(-1, keepdim=True)
        return {"scale": (largest / self.levels).clamp_min(1e-12)}

    def encode(self, weight, qparams):
        codes = (weight.float() / qparams["scale"]).round()
        return codes.clamp(-self.levels, self.levels).to(torch.int8)

    def decode(self, codes, qparams):
        return codes.float() * qparams["scale"]

    def pack(self, codes, qparams, *, dtype):
        (kind,) = self.tensor_types
        return kind(codes, qparams["scale"], shape=codes.shape, dtype=dtype, **vars(self))


def register(kind):
    SCHEMES.add(kind.name, kind, SOURCE)
    return kind()


def reference(x, weight):
    return x @ weight.t()


def samples(device):
    generator = torch.Generator().manual_seed(1)
    for rows, n, k in ((3, 7, 5), (1, 1, 63), (0, 7, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = (torch.randn(size, k, generator=generator) for size in (rows, n))
            yield x.to(device, dtype), weight.to(device, dtype)


def kernel_of(name, fn, **parts):
    """An op with one kernel, both registered."""
    fields = {
        "reference": reference,
        "fake": lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
        "samples": samples,
    }
    rejects = {"rejects": parts.pop("rejects")} if "rejects" in parts else {}
    op = ao.Op(name, "(Tensor x, Tensor weight) -> Tensor", **{**fields, **parts})
    kernel = ao.Kernel(name, "mine", fn, **rejects)
    OPS.add(name, op, SOURCE)
    KERNELS.add(f"{name}/mine", kernel, SOURCE)
    clear_choices()
    return op, kernel


def right_kernel(x, weight):
    return torch.einsum("mk,nk->mn", x, weight)
