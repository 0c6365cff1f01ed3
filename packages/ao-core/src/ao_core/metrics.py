"""What a change cost and what it brought: noise, stored bytes, perplexity, tokens per second."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
    _check_tokens(model, tokens, needed=context, positions=context)
    windows = tokens.unfold(0, context, stride)  # [w, context], a view
    # The first window scores all but its first token, a later one what it adds.
    counts = [context - 1] + [min(stride, context - 1)] * (len(windows) - 1)
    means: list[float] = []
    with _evaluating(model), torch.no_grad():
        for batch in torch.split(windows, batch_size):
            ids = batch.to(_device(model, tokens), torch.int64)  # [b, context]
            logits = _logits(model(ids, **_options(model, use_cache=False)), ids)
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


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one sequence; decoding is None for a model without a KV cache."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None


def speed(
    model: nn.Module, tokens: Tensor, *, prefill: int = 256, decode: int = 32, repeats: int = 3
) -> Speed:
    """Time reading a prompt at once, then writing greedily one token a call.

    The best of several runs counts, so that compiling and warming up do not. Decoding goes through
    the cache that a Hugging Face model returns, and only the last position is turned into logits
    where the model offers that, as in text generation.

    Args:
        model: as for :func:`perplexity`.
        tokens: integers ``[n]``, of which the first ``prefill`` are read.
        prefill: tokens read at once.
        decode: tokens written.
        repeats: runs, of which the best counts.

    Raises:
        OptionError: an option below 1, or more tokens than the model has positions.
        ModelError: tokens of another form, too few of them or outside the vocabulary.
    """
    if min(prefill, decode, repeats) < 1:
        raise OptionError(
            f"prefill, decode and repeats must be 1 or more, found {prefill}, {decode} and {repeats}"
        )
    _check_tokens(model, tokens, needed=prefill, positions=prefill + decode)
    ids = tokens[:prefill].to(_device(model, tokens), torch.int64)[None]  # [1, prefill]
    with _evaluating(model), torch.no_grad():
        runs = [_time_once(model, ids, decode) for _ in range(repeats)]
    decoding = [seconds for _, seconds in runs if seconds is not None]
    return Speed(
        prefill_tokens_per_s=prefill / min(seconds for seconds, _ in runs),
        decode_tokens_per_s=decode / min(decoding) if decoding else None,
    )


_CACHES = ("cache", "past_key_values")  # from transformers 5.24 or so on, and before


def _time_once(model: nn.Module, ids: Tensor, decode: int) -> tuple[float, float | None]:
    """Seconds of a prefill and of ``decode`` steps of one token (None without a cache)."""
    options = _options(model, use_cache=True, logits_to_keep=1)
    start = _now(ids.device)
    output = model(ids, **options)
    prefill_seconds = _now(ids.device) - start
    kept = next((name for name in _CACHES if getattr(output, name, None) is not None), None)
    if kept is None:
        return prefill_seconds, None
    start = _now(ids.device)
    for _ in range(decode):
        token = output.logits[:, -1].argmax(-1, keepdim=True)  # [1, 1]
        output = model(token, **{kept: getattr(output, kept)}, **options)
    return prefill_seconds, _now(ids.device) - start


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _check_windows(context: int, stride: int, batch_size: int) -> None:
    if context < 2:
        raise OptionError(f"context must be 2 tokens or more to score one, found {context}")
    if not 1 <= stride <= context:
        raise OptionError(f"stride must lie between 1 and the context {context}, found {stride}")
    if batch_size < 1:
        raise OptionError(f"batch_size must be 1 or more, found {batch_size}")


def _check_tokens(model: nn.Module, tokens: Tensor, *, needed: int, positions: int) -> None:
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and positions > limit:
        raise OptionError(f"{positions} tokens at once exceed the model's {limit} positions")
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.dtype is torch.bool:
        raise ModelError(
            f"tokens must be integers in one dimension, found {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    if len(tokens) < needed:
        raise ModelError(
            f"the text has {len(tokens)} tokens and one window takes {needed}; "
            "pass a longer text, or ask for a shorter window"
        )
    vocabulary = getattr(config, "vocab_size", None)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        raise ModelError(
            f"tokens from {low} to {high} do not fit a vocabulary of {vocabulary or 'any size'}; "
            "tokenize the text with the model's own tokenizer"
        )


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


def _options(model: nn.Module, **wanted: object) -> dict[str, Any]:
    """Those of ``wanted`` that the model's forward takes by name."""
    original: Any = getattr(model, "_orig_mod", model)  # torch.compile hides the signature
    names = inspect.signature(original.forward).parameters
    return {name: value for name, value in wanted.items() if name in names}


def _device(model: nn.Module, tokens: Tensor) -> torch.device:
    return next(iter((*model.parameters(), *model.buffers())), tokens).device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the mode that each module had afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
