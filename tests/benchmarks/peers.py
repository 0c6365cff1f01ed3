"""Linears of other libraries, for ``--peers``: each makes of a float weight what multiplies with it.

Written for torchao 0.18, bitsandbytes 0.50, gemlite 0.6. What is not installed, or does not work here, is
skipped with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import ao_core as ao
from ao_core.speed import Meter, Speed

Linear = Callable[[torch.Tensor], torch.Tensor]
LEAST_SQNR = 14  # dB against the float weight: what 4 bits reach, and no wrong layout does


@dataclass(frozen=True)
class Peer:
    """What kernels of an op are compared with.

    Attributes:
        op: whose group it is shown in.
        name: of the library.
        make: a linear of a float weight ``[N, K]``.
        module: that must be importable; nothing for what torch brings.
        bits: of a weight's element.
        least_rows: that it takes.
        codes: whether the activations are int8 codes.
    """

    op: str
    name: str
    make: Callable[[torch.Tensor], Linear]
    module: str = ""
    bits: int = 8
    least_rows: int = 1
    codes: bool = False

    def speed(self, meter: Meter, n: int, k: int, rows: int) -> Speed:
        """Checked and timed.

        Raises:
            RejectedError: it is not installed, takes more rows, or its result is wrong.
        """
        if rows < self.least_rows:
            raise ao.RejectedError(f"{self.name} takes {self.least_rows} rows and more")
        if self.module:
            try:
                importlib.import_module(self.module)
            except Exception as error:
                reason = f"{self.module} can't be imported: {type(error).__name__}: {error}"
                raise ao.RejectedError(reason) from error
        x = meter.activations(rows, k)
        if self.codes:
            x = (x * 30).round().clamp(-127, 127).to(torch.int8)

        @functools.cache
        def linear(seed: int) -> Linear:
            generator = torch.Generator(meter.device).manual_seed(seed)
            return self.make(_weight(n, k, generator, meter))

        weight = _weight(n, k, torch.Generator(meter.device).manual_seed(0), meter)
        expected, found = x.double() @ weight.double().t(), linear(0)(x)
        moved = n * k * self.bits // 8 + x.nbytes + found.nbytes
        wide = found.double()
        scale = (wide * expected).sum() / expected.square().sum()  # of codes: the product alone
        if not (reached := ao.sqnr(expected, wide / scale)) > LEAST_SQNR:
            raise ao.RejectedError(f"{self.name} is wrong: {reached:.1f} dB")
        return meter.calls(
            lambda seed: functools.partial(linear(seed), x), n * k * self.bits // 8, moved, n, k, rows
        )


def _weight(n: int, k: int, generator: torch.Generator, meter: Meter) -> torch.Tensor:
    return torch.randn(n, k, generator=generator, device=meter.device, dtype=meter.dtype) / k**0.5


def tinygemm(weight: torch.Tensor) -> Linear:
    """What torch brings for int4, groups of 128."""
    with ao.use_provider("torch"):
        quantized = ao.parse_scheme("int4-weight-only:qparams=minmax").quantize(weight)

    def run(x: torch.Tensor) -> torch.Tensor:
        with ao.use_provider("torch"):
            return F.linear(x, quantized)

    return run


def torchao(weight: torch.Tensor, config: str, *, compiled: bool, **options: Any) -> Linear:
    from torchao import quantization

    n, k = weight.shape
    linear = torch.nn.Linear(k, n, bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    quantization.quantize_(linear, getattr(quantization, config)(**options))
    if type(linear.weight.data) is torch.Tensor:
        raise ao.RejectedError(f"torchao left a weight [{n}, {k}] as it was")
    held, call = linear.weight, _compiled if compiled else F.linear
    return lambda x: call(x, held)  # torchao looks for the weight among the positional arguments


def torchao_nf4(weight: torch.Tensor) -> Linear:
    from torchao.quantization import to_nf4

    held = to_nf4(weight, 64, 256)
    return lambda x: F.linear(x, held)


@functools.cache
def _compiler() -> Callable[..., torch.Tensor]:
    # More kinds of weights and shapes come by than a function is compiled for by default.
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(F.linear, dynamic=False)


def _compiled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _compiler()(x, weight)


def bitsandbytes_nf4(weight: torch.Tensor) -> Linear:
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)


def bitsandbytes_int8(weight: torch.Tensor) -> Linear:
    import bitsandbytes as bnb

    codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))

    def run(x: torch.Tensor) -> torch.Tensor:
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights, state.is_training = codes, scale, False, False
        return bnb.matmul(x, codes, state=state)

    return run


def gemlite_int4(weight: torch.Tensor) -> Linear:
    from gemlite.helper import A16W4_HQQ_INT

    groups = weight.float().view(-1, 128)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / 15
    zero = -low / scale
    codes = (groups / scale + zero).round().clamp(0, 15).to(torch.uint8).view(weight.shape)
    shape = (weight.shape[0], -1)
    made = A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype)
    return made.from_weights(codes, scale.to(weight.dtype).view(shape), zero.to(weight.dtype).view(shape))


def gemlite_int8(weight: torch.Tensor) -> Linear:
    from gemlite.helper import A16W8_INT8

    return A16W8_INT8(device=str(weight.device), dtype=weight.dtype).from_weights(weight.clone())


def gemlite_int8_dynamic(weight: torch.Tensor) -> Linear:
    from gemlite.helper import A8W8_int8_dynamic

    return A8W8_int8_dynamic(device=str(weight.device), dtype=weight.dtype).from_weights(weight.clone())


def cublas_int8(weight: torch.Tensor) -> Linear:
    """The product alone, of activations that are codes."""
    codes = (weight / weight.abs().amax() * 127).round().to(torch.int8)
    return lambda x: torch._int_mm(x, codes.t())


_TILES = {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}
PEERS = (
    Peer("int4_weight_linear", "tinygemm", tinygemm, bits=4),
    Peer(
        "int4_weight_linear", "torchao",
        functools.partial(torchao, config="Int4WeightOnlyConfig", compiled=False, **_TILES), "torchao", 4,
    ),
    Peer("int4_weight_linear", "gemlite", gemlite_int4, "gemlite", bits=4),
    Peer("nf4_linear", "bitsandbytes", bitsandbytes_nf4, "bitsandbytes", bits=4),
    Peer("nf4_linear", "torchao", torchao_nf4, "torchao", bits=4),
    Peer(
        "int8_weight_linear", "torchao",
        functools.partial(torchao, config="Int8WeightOnlyConfig", compiled=True), "torchao",
    ),
    Peer("int8_weight_linear", "gemlite", gemlite_int8, "gemlite"),
    Peer(
        "int8_dynamic_linear", "torchao",
        functools.partial(torchao, config="Int8DynamicActivationInt8WeightConfig", compiled=True), "torchao",
    ),
    Peer("int8_dynamic_linear", "bitsandbytes", bitsandbytes_int8, "bitsandbytes"),
    Peer("int8_dynamic_linear", "gemlite", gemlite_int8_dynamic, "gemlite"),
    Peer("int8_mm", "cuBLAS", cublas_int8, least_rows=17, codes=True),
)  # fmt: skip
"""By op and library."""
