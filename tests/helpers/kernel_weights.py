"""Weights in codes of every kind, with the values that they stand for, and the ops that read such."""

from __future__ import annotations

import torch

from ao_core.numerics import pack
from ao_kernels.weight_linear import Codes

# dB against float64 with the weight as stored: what 16-bit weights and results cost. The interpreter cuts
# bfloat16 off where a GPU rounds.
LEAST = {torch.bfloat16: 46 if torch.cuda.is_available() else 39, torch.float16: 62}
OPS = (
    "int8_mm",
    "int8_scaled_mm",
    "int4_weight_linear",
    "nf4_linear",
    "nf4_dequantize",
    "int8_weight_linear",
    "int8_dynamic_linear",
    "int8_dynamic_int4_linear",
    "float8_weight_linear",
    "float8_dynamic_linear",
    "int4_experts_linear",
    "nf4_experts_linear",
    "int8_experts_linear",
    "float8_experts_linear",
)
"""Those that have a kernel here."""

KINDS = (
    "int4",
    "int4, midpoints",
    "int4, zero points",
    "nf4",
    "nf4, double",
    "int8",
    "int8, groups",
    "float8",
    "float8, one scale",
)


def codes(kind, n, k, device, *, seed=0):
    """A weight ``[n, k]`` of a kind of ``KINDS``, and its float64 values."""
    generator = torch.Generator().manual_seed(n + k + 1000 * seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator) / 4 + 0.01

    size = 64 if kind == "nf4, double" else 32
    groups = 1 if k <= size else -(-k // size)
    of = torch.arange(k) // size if groups > 1 else torch.zeros(k, dtype=torch.long)
    options = {"group_size": size if groups > 1 else -1}
    if kind.startswith("int8"):
        stored = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        scale = uniform(n, groups if kind == "int8, groups" else 1)
        options["group_size"] = options["group_size"] if kind == "int8, groups" else -1
        values = stored.double() * scale.double()[:, of if kind == "int8, groups" else torch.zeros_like(of)]
        return Codes("int8", stored.to(device), scale.to(device), **options), values
    if kind.startswith("float8"):
        stored = (torch.randn(n, k, generator=generator) * 9).to(torch.float8_e4m3fn)
        scale = uniform(1 if kind == "float8, one scale" else n, 1)
        return Codes("float8", stored.to(device), scale.to(device)), stored.double() * scale.double()
    nibbles = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    if kind.startswith("nf4"):
        from ao_quant.nf4_ops import NF4_LEVELS

        scale = uniform(n, groups)
        if kind == "nf4, double":
            scalers = -(-groups // 3)
            scale = torch.randint(0, 256, (n, groups), generator=generator, dtype=torch.uint8)
            options |= {
                "offset": uniform(n, scalers) + 0.3,
                "step": uniform(n, scalers) / 300,
                "scaler_size": 3,
            }
            root = scale.double() * options["step"].double()[:, torch.arange(groups) // 3]
            absmax = (root + options["offset"].double()[:, torch.arange(groups) // 3]) ** 4
        else:
            absmax = scale.double()
        values = torch.tensor(NF4_LEVELS).double()[nibbles.long()] * absmax[:, of]
    else:
        scale = uniform(n, groups).bfloat16()
        steps = nibbles.double()
        zero = {
            "int4": None,
            "int4, midpoints": torch.randn(n, groups, generator=generator).bfloat16(),
            "int4, zero points": torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8),
        }[kind]
        middle = zero.double()[:, of] if kind == "int4, zero points" else 8
        values = (steps - middle) * scale.double()[:, of]
        if kind == "int4, midpoints":
            values += zero.double()[:, of]
        options["zero"] = zero
    moved = {
        name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in options.items()
    }
    packed = pack.pack(nibbles, bits=4).to(device)
    return Codes(kind.split(",")[0], packed, scale.to(device), **moved), values
