"""Linears of other libraries, for `--peers`: each makes of a float weight what multiplies with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import ao_core as ao

Linear = Callable[[torch.Tensor], torch.Tensor]


def tinygemm(weight: torch.Tensor) -> Linear:
    with ao.use_provider("torch"):
        quantized = ao.parse_scheme("int4-weight-only:qparams=minmax").quantize(weight)

    def run(x: torch.Tensor) -> torch.Tensor:
        with ao.use_provider("torch"):
            return F.linear(x, quantized)

    return run


def bitsandbytes(weight: torch.Tensor) -> Linear:
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)


def gemlite_int4(weight: torch.Tensor) -> Linear:
    from gemlite.helper import A16W4_HQQ_INT

    groups = weight.float().view(-1, 128)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / 15
    zero = -low / scale
    codes = (groups / scale + zero).round().clamp(0, 15).to(torch.uint8).view(weight.shape)
    shape = (weight.shape[0], -1)
    made = A16W4_HQQ_INT(device="cuda:0", dtype=torch.bfloat16)
    return made.from_weights(codes, scale.bfloat16().view(shape), zero.bfloat16().view(shape))


def gemlite_int8(weight: torch.Tensor) -> Linear:
    from gemlite.helper import A16W8_INT8

    return A16W8_INT8(device="cuda:0", dtype=torch.bfloat16).from_weights(weight)


def gemlite_int8_dynamic(weight: torch.Tensor) -> Linear:
    from gemlite.helper import A8W8_int8_dynamic

    return A8W8_int8_dynamic(device="cuda:0", dtype=torch.bfloat16).from_weights(weight)


def cublas_int8(weight: torch.Tensor) -> Linear:
    """The product alone, of activations that are codes."""
    codes = (weight / weight.abs().amax() * 127).round().to(torch.int8)
    return lambda x: torch._int_mm(x, codes.t())


# By op: what a kernel of it is compared with.
PEERS: dict[str, dict[str, Callable[[torch.Tensor], Linear]]] = {
    "int4_weight_linear": {"tinygemm": tinygemm, "gemlite": gemlite_int4},
    "nf4_linear": {"bitsandbytes": bitsandbytes},
    "int8_weight_linear": {"gemlite": gemlite_int8},
    "int8_dynamic_linear": {"gemlite": gemlite_int8_dynamic},
    "int8_mm": {"cuBLAS": cublas_int8},
}
