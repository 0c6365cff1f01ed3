"""What a change cost and what it brought: noise, stored bytes, zeros, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ao_core.causal import accepted, check_tokens, device_of, evaluating
from ao_core.errors import ModelError, OptionError

_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio ``20 log10(|x| / |x - y|)`` in dB, computed in float64.

    The two have one shape, any dtype and device; quantized tensors are dequantized. Equal tensors
    give ``inf``, a zero reference that is not matched gives ``-inf``.

    Raises:
        ValueError: the shapes differ, or a tensor is empty or holds NaN or infinity.
    """
    x, y = _dense(reference), _dense(approximation)
    if x.shape != y.shape or x.numel() == 0:
        raise ValueError(
            "sqnr compares two tensors of one shape with at least one element, found the shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    for name, value in (("reference", x), ("approximation", y)):
        if not torch.isfinite(value).all():
            raise ValueError(f"sqnr needs finite values, found NaN or infinity in the {name}")
    signal, noise = x.norm().item(), (x - y).norm().item()
    if noise == 0.0:
        return math.inf
    return 20.0 * (math.log10(signal) - math.log10(noise)) if signal else -math.inf


def _dense(tensor: Tensor) -> Tensor:
    plain = tensor.dequantize() if _is_wrapper(tensor) else tensor
    return plain.detach().to("cpu", torch.float64)


def _is_wrapper(tensor: Tensor) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))


@dataclass(frozen=True)
class ModelBytes:
    """Bytes that a model stores, memory that several tensors share counted once.

    Attributes:
        total: parameters and buffers, persistent or not.
        linear_weights: weights of ``nn.Linear`` that no other kind of module owns too, so without
            an output head that is tied to its embedding.
        linear_elements: how many numbers those weights stand for, so that
            ``linear_weights / (2 * linear_elements)`` is their size against bfloat16.
        by_dtype: ``total`` by the dtype that is stored, such as ``{"int8": 4096}``.
    """

    total: int
    linear_weights: int
    linear_elements: int
    by_dtype: dict[str, int]


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor; for a wrapper subclass those of its inner tensors.

    Memory that inner tensors share, or that an expanded tensor repeats, counts once.
    """
    return _Ledger().add(tensor)


def model_bytes(model: nn.Module) -> ModelBytes:
    """Count what ``model`` stores, see :class:`ModelBytes`."""
    everything, linears = _Ledger(), _Ledger()
    total = sum(everything.add(tensor) for tensor in (*model.parameters(), *model.buffers()))
    counted = _linear_weights(model)
    return ModelBytes(
        total=total,
        linear_weights=sum(linears.add(weight) for weight in counted),
        linear_elements=sum(weight.numel() for weight in counted),
        by_dtype=everything.by_dtype,
    )


def _linear_weights(model: nn.Module) -> list[Tensor]:
    """Weights of ``nn.Linear`` that no other kind of module owns too, each once."""
    owners = [module for module in model.modules() if not isinstance(module, nn.Linear)]
    elsewhere = {id(p) for module in owners for p in module.parameters(recurse=False)}
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    return [weight for key, weight in weights.items() if key not in elsewhere]


def sparsity(model: nn.Module) -> float:
    """The share of zeros among the weights of linears, quantized ones as they dequantize.

    The weights are those of :attr:`ModelBytes.linear_weights`; NaN if there are none.
    """
    zeros = total = 0
    for weight in _linear_weights(model):
        values = weight.dequantize() if _is_wrapper(weight) else weight.detach()
        zeros += weight.numel() - int(values.count_nonzero())
        total += weight.numel()
    return zeros / total if total else math.nan


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The plain strided tensors that ``tensor`` is made of."""
    if _is_wrapper(tensor):
        wrapper: Any = tensor
        for name in wrapper.__tensor_flatten__()[0]:
            yield from _leaves(getattr(wrapper, name))
    elif tensor.layout in _SPARSE_PARTS:
        yield from (getattr(tensor.detach(), part)() for part in _SPARSE_PARTS[tensor.layout])
    else:
        yield tensor


class _Ledger:
    """Adds up the memory of tensors and counts each byte of each storage once."""

    def __init__(self) -> None:
        self.by_dtype: dict[str, int] = {}
        self._spans: dict[int, list[tuple[int, int]]] = {}
        self._alive: list[Tensor] = []  # the address of a storage tells it apart while it lives

    def add(self, tensor: Tensor) -> int:
        """Bytes of ``tensor`` that no earlier one covered."""
        total = 0
        for leaf in _leaves(tensor):
            size = self._add_leaf(leaf) if leaf.numel() else 0
            dtype = str(leaf.dtype).removeprefix("torch.")
            self.by_dtype[dtype] = self.by_dtype.get(dtype, 0) + size
            total += size
        return total

    def _add_leaf(self, leaf: Tensor) -> int:
        self._alive.append(leaf)
        spans = self._spans.setdefault(leaf.untyped_storage()._cdata, [])
        last = sum((n - 1) * leaf.stride(dim) for dim, n in enumerate(leaf.shape))
        start, item = int(leaf.storage_offset()), leaf.element_size()
        before = sum(end - begin for begin, end in spans)
        spans[:] = _union([*spans, (start * item, (start + last + 1) * item)])
        return sum(end - begin for begin, end in spans) - before


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on a text.

    Attributes:
        perplexity: the exponential of ``nll``.
        nll: mean negative log-likelihood of a scored token, in nats.
        nll_se: its standard error over windows; NaN for a single window.
        ppl_se: standard error of ``perplexity`` by the delta method.
        windows: mean NLL of each window.
        counts: scored tokens of each window.
        tokens_scored: their sum.
    """

    perplexity: float
    nll: float
    nll_se: float
    ppl_se: float
    windows: list[float]
    counts: list[int]
    tokens_scored: int


@dataclass(frozen=True)
class Delta:
    """A mean difference of NLL per token in nats, and its paired standard error over windows."""

    mean: float
    se: float


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    context: int = 512,
    stride: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on a text, log-softmax in float32.

    A window of ``context`` tokens starts every ``stride`` tokens. By default windows do not overlap
    and every token but the first of each is scored. With a shorter stride a window scores only what
    no earlier one did: each token once, with the most context. Windows are whole, so that up to
    ``stride - 1`` tokens at the end are left out.

    Args:
        model: takes ids ``[b, context]`` and returns logits ``[b, context, vocabulary]``, or an
            object that has them as ``.logits``. Runs in eval mode, which is put back afterwards.
        tokens: the text, integers ``[n]``, n ≥ ``context``.
        context: tokens in a window, 2 or more.
        stride: tokens between the starts of windows, 1 to ``context`` (the default).
        batch_size: windows in one call of the model.
        progress: called with the windows done and all windows, after each batch.

    Raises:
        OptionError: an option outside its range, or more context than the model has positions.
        ModelError: tokens of another form, too few of them or outside the vocabulary; logits of
            another shape, or NaN.
    """
    stride = context if stride is None else stride
    _check_windows(context, stride, batch_size)
    check_tokens(model, tokens, needed=context, positions=context)
    windows = tokens.unfold(0, context, stride)  # [w, context], a view
    # The first window scores all but its first token, a later one what it adds.
    counts = [context - 1] + [min(stride, context - 1)] * (len(windows) - 1)
    means: list[float] = []
    with evaluating(model), torch.no_grad():
        for batch in torch.split(windows, batch_size):
            ids = batch.to(device_of(model, tokens), torch.int64)  # [b, context]
            logits = _logits(model(ids, **accepted(model, use_cache=False)), ids)
            for row, targets in zip(logits, ids, strict=True):
                done = len(means)
                means.append(_window_nll(row, targets, count=counts[done], start=done * stride))
            if progress is not None:
                progress(len(means), len(windows))
    nll, se = _mean_and_se(means, counts)
    value = math.exp(nll) if nll < 700.0 else math.inf
    return Perplexity(value, nll, se, value * se, means, counts, sum(counts))


def _window_nll(logits: Tensor, ids: Tensor, *, count: int, start: int) -> float:
    """Mean NLL of the last ``count`` tokens of a window; logits ``[t, v]``, ids ``[t]``."""
    scored = logits[-count - 1 : -1].float()  # [count, v]: the token at t + 1 is predicted at t
    nll = F.cross_entropy(scored, ids[-count:], reduction="none").double().mean().item()
    if math.isnan(nll):
        raise ModelError(
            f"the model returned NaN logits in the window of tokens {start} to "
            f"{start + len(ids) - 1}; look for overflow in its dtype or for a damaged weight"
        )
    return nll


def _mean_and_se(values: list[float], counts: list[int]) -> tuple[float, float]:
    """Mean over tokens and its standard error, std(ddof=1) / sqrt(n) where counts are equal."""
    tokens, n = sum(counts), len(values)
    mean = math.fsum(v * c for v, c in zip(values, counts, strict=True)) / tokens
    if n < 2:
        return mean, math.nan
    squares = (((v - mean) * c) ** 2 for v, c in zip(values, counts, strict=True))
    return mean, math.sqrt(math.fsum(squares) * n / (n - 1)) / tokens


def delta_nll(reference: Perplexity, other: Perplexity) -> Delta:
    """NLL of ``other`` minus that of ``reference`` (positive: worse), paired over windows.

    Raises:
        ValueError: the two were not measured on the same windows.
    """
    if reference.counts != other.counts:
        raise ValueError(
            f"a paired difference needs the same windows, found {len(reference.counts)} of "
            f"{reference.tokens_scored} tokens and {len(other.counts)} of {other.tokens_scored}; "
            "evaluate both on one text with one context and stride"
        )
    differences = [b - a for a, b in zip(reference.windows, other.windows, strict=True)]
    return Delta(*_mean_and_se(differences, reference.counts))


def _check_windows(context: int, stride: int, batch_size: int) -> None:
    if context < 2:
        raise OptionError(f"context must be 2 tokens or more to score one, found {context}")
    if not 1 <= stride <= context:
        raise OptionError(f"stride must lie between 1 and the context {context}, found {stride}")
    if batch_size < 1:
        raise OptionError(f"batch_size must be 1 or more, found {batch_size}")


def _logits(output: Any, ids: Tensor) -> Tensor:
    """Logits ``[b, t, v]`` in what a model returned for ids ``[b, t]``."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"the model returned {found} where a causal language model returns logits "
            f"{[*ids.shape, 'vocabulary']}"
        )
    if int(ids.max()) >= logits.shape[-1]:
        raise ModelError(
            f"token {int(ids.max())} has no logit, the model returned {logits.shape[-1]}; "
            "tokenize the text with the model's own tokenizer"
        )
    return logits
