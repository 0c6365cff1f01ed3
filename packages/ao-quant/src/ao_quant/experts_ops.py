"""Linears of stacks of experts ``[E, N, K]``: rows sorted by expert, each times its own weight, in one op.

``int4_experts_linear``, ``nf4_experts_linear``, ``int8_experts_linear`` and ``float8_experts_linear`` take
what the linears of single weights take, with E in front of each tensor of the weight, no bias, and offsets.
``torch.bmm`` and ``torch._grouped_mm`` call them: the two ways in which mixtures of experts multiply.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ao_core import Kernel, Key, Op
from ao_core.numerics import affine
from ao_quant.decoded import rejects_device
from ao_quant.float8_ops import FLOAT8_WEIGHT_LINEAR
from ao_quant.int4_ops import INT4_WEIGHT_LINEAR, dequantize_int4
from ao_quant.int8_ops import INT8_WEIGHT_LINEAR
from ao_quant.nf4_ops import NF4_LINEAR, dequantize_nf4

Linear = Callable[..., torch.Tensor]


def check_experts(x: torch.Tensor, offsets: torch.Tensor | None, experts: int) -> None:
    """Raise RuntimeError unless rows ``x`` ``[S, K]`` can be shared among ``experts``."""
    if x.ndim != 2 or (offsets is None and x.shape[0] % max(experts, 1)):
        raise RuntimeError(
            f"{experts} experts need rows [S, K], and S a multiple of {experts} unless there are offsets; "
            f"found {tuple(x.shape)}."
        )
    if offsets is None:
        return
    if tuple(offsets.shape) != (experts,) or offsets.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(
            f"{experts} experts need as many offsets in int32 or int64, and were given "
            f"{offsets.dtype} {tuple(offsets.shape)}."
        )


def by_expert(linear: Linear, x: torch.Tensor, offsets: torch.Tensor | None, *weight: Any) -> torch.Tensor:
    """One call of ``linear`` for each expert that has rows; the host reads the offsets.

    Args:
        linear: ``linear(x, *tensors, bias, *options)`` for a weight ``[N, K]``.
        x: float ``[S, K]``.
        offsets: integers ``[E]``: where the rows of each expert end; None: all have S / E.
        *weight: tensors of a stack (``[1, 1]``: a scale that all share), and options.

    Returns:
        ``[S, N]`` in the dtype of ``x``; rows after the last expert's are zero.
    """
    experts, n = weight[0].shape[:2]
    check_experts(x, offsets, experts)
    each = x.shape[0] // max(experts, 1)
    ends = [each * (e + 1) for e in range(experts)] if offsets is None else offsets.tolist()
    out = x.new_zeros(x.shape[0], n)
    tensors, options = _parts(weight)
    for e, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        if end > start:
            own = (t[e] if t is not None and t.ndim == 3 else t for t in tensors)
            out[start:end] = linear(x[start:end], *own, None, *options)
    return out


def _parts(weight: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """Tensors, absent ones too, and options."""
    options = [each for each in weight if isinstance(each, int)]
    return list(weight[: len(weight) - len(options)]), options


def dense(
    decode: Callable[..., torch.Tensor], x: torch.Tensor, offsets: torch.Tensor | None, *weight: Any
) -> torch.Tensor | None:
    """The stack in floats and torch's product of it, without reading offsets; None where torch has none.

    Args:
        decode: ``decode(x, *weight)`` gives the stack ``[E, N, K]`` in the dtype of ``x``.
        x: float ``[S, K]``.
        offsets: see :func:`by_expert`.
        *weight: see there.
    """
    experts, n = weight[0].shape[:2]
    check_experts(x, offsets, experts)
    if offsets is None:
        rows = x.reshape(experts, -1, x.shape[1])
        return torch.bmm(rows, decode(x, *weight).transpose(1, 2)).view(x.shape[0], n)
    if not groupable(x, n):
        return None
    out = torch._grouped_mm(x, decode(x, *weight).transpose(1, 2), offsets.to(torch.int32))
    beyond = torch.arange(x.shape[0], device=x.device) >= offsets[-1]
    return out.masked_fill_(beyond.unsqueeze(1), 0)  # torch leaves them unwritten


def groupable(x: torch.Tensor, n: int) -> bool:
    """Whether ``torch._grouped_mm`` takes rows ``x`` ``[S, K]`` and a plain stack of ``n`` outputs.

    It takes bfloat16 in rows of multiples of 16 bytes; from torch 2.10 on every CUDA device from 8.0 on.
    """
    aligned = x.stride(1) == 1 and not (x.shape[1] % 8 or n % 8 or x.stride(0) % 8 or x.data_ptr() % 16)
    return hasattr(torch.nn.functional, "grouped_mm") and x.dtype == torch.bfloat16 and aligned


def _experts_op(linear: Op, decode: Callable[..., torch.Tensor]) -> tuple[Op, list[Kernel]]:
    """The op for stacks of what ``linear`` takes, and what torch and the native linears compute for it."""
    name = linear.name.replace("_weight_linear", "_linear").replace("_linear", "_experts_linear")

    def reference(x: torch.Tensor, offsets: torch.Tensor | None, *weight: Any) -> torch.Tensor:
        return by_expert(linear.reference, x, offsets, *weight)

    def fake(x: torch.Tensor, offsets: torch.Tensor | None, *weight: Any) -> torch.Tensor:
        return x.new_empty(x.shape[0], weight[0].shape[1])

    def run(x: torch.Tensor, offsets: torch.Tensor | None, *weight: Any) -> torch.Tensor:
        """On a CPU the linear of each expert that has rows; elsewhere the stack in floats, if possible."""
        found = None if x.device.type == "cpu" or not x.numel() else dense(decode, x, offsets, *weight)
        return by_expert(linear, x, offsets, *weight) if found is None else found

    def run_native(x: torch.Tensor, offsets: torch.Tensor | None, *weight: Any) -> torch.Tensor:
        return by_expert(functools.partial(linear, provider="native"), x, offsets, *weight)

    schema = linear.schema.replace("Tensor x", "Tensor x, Tensor? offsets").replace(", Tensor? bias", "")
    op = Op(
        name, schema, reference=reference, fake=fake, samples=lambda device: _samples(linear, device),
        activations=2,
    )  # fmt: skip
    return op, [
        Kernel(name, "torch", run, rejects=rejects_device),
        Kernel(name, "native", run_native, priority=-2, rejects=_rejects_native),  # for plans that pin it
    ]


def _rejects_native(key: Key) -> str | None:
    return None if key.device.type == "cpu" else f"it runs on cpu, not on {key.device.type}"


def _samples(linear: Op, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Stacks of three and of one of every third sample of the linear: equal shares, and offsets.

    One expert has no rows, one in the stack's middle has a single one, and some rows belong to none.
    """
    for index, (x, *weight) in enumerate(itertools.islice(linear.samples(device), 0, None, 3)):
        tensors, options = _parts(tuple(weight))
        stack = [_stacked(linear, tensor) for tensor in tensors[:-1]]  # the last is the bias
        rows = x.shape[0]
        if index % 3 == 0:
            yield x.repeat(3, 1), None, *stack, *options
        elif index % 3 == 1:
            ends = torch.tensor([0, min(rows, 1), rows - rows // 4], device=device, dtype=torch.int32)
            yield x, ends, *stack, *options
        else:
            one = [t[:1] if t is not None and t.ndim == 3 else t for t in stack]
            yield x, torch.tensor([rows], device=device), *one, *options


def _stacked(linear: Op, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Of three experts whose rows are each other's; a scale that all rows share stays."""
    shared = linear is FLOAT8_WEIGHT_LINEAR and tensor is not None and tensor.shape == (1, 1)
    if tensor is None or shared:
        return tensor
    rows = torch.arange(tensor.shape[0], device=tensor.device)
    return torch.stack([tensor[rows], tensor[rows.flip(0)], tensor[rows // 2]])


def _decode_int4(x: torch.Tensor, *weight: Any) -> torch.Tensor:
    *tensors, size = weight
    return dequantize_int4(*tensors, columns=x.shape[1], group_size=size, dtype=x.dtype)


def _decode_nf4(x: torch.Tensor, *weight: Any) -> torch.Tensor:
    *tensors, size, scaler_size = weight
    return dequantize_nf4(
        *tensors, columns=x.shape[1], block_size=size, scaler_block_size=scaler_size, dtype=x.dtype
    )


def _decode_int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    return affine.dequantize(codes, scale, group_size=size, dtype=x.dtype)


def _decode_float8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (codes.float() * scale).to(x.dtype)


INT4_EXPERTS_LINEAR, _int4 = _experts_op(INT4_WEIGHT_LINEAR, _decode_int4)
NF4_EXPERTS_LINEAR, _nf4 = _experts_op(NF4_LINEAR, _decode_nf4)
INT8_EXPERTS_LINEAR, _int8 = _experts_op(INT8_WEIGHT_LINEAR, _decode_int8)
FLOAT8_EXPERTS_LINEAR, _float8 = _experts_op(FLOAT8_WEIGHT_LINEAR, _decode_float8)

OPS = [INT4_EXPERTS_LINEAR, NF4_EXPERTS_LINEAR, INT8_EXPERTS_LINEAR, FLOAT8_EXPERTS_LINEAR]
KERNELS = [*_int4, *_nf4, *_int8, *_float8]
