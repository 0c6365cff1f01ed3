"""Tokens a second of a causal language model: reading a prompt, then writing."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ao_core.causal import accepted, cache_name, check_tokens, device_of, evaluating
from ao_core.errors import OptionError


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
        model: as for :func:`ao_core.perplexity`.
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
    check_tokens(model, tokens, needed=prefill, positions=prefill + decode)
    ids = tokens[:prefill].to(device_of(model, tokens), torch.int64)[None]  # [1, prefill]
    with evaluating(model), torch.no_grad():
        runs = [_time_once(model, ids, decode) for _ in range(repeats)]
    decoding = [seconds for _, seconds in runs if seconds is not None]
    return Speed(
        prefill_tokens_per_s=prefill / min(seconds for seconds, _ in runs),
        decode_tokens_per_s=decode / min(decoding) if decoding else None,
    )


def _time_once(model: nn.Module, ids: Tensor, decode: int) -> tuple[float, float | None]:
    """Seconds of a prefill and of ``decode`` steps of one token (None without a cache)."""
    options = accepted(model, use_cache=True, logits_to_keep=1)
    start = _now(ids.device)
    output = model(ids, **options)
    prefill_seconds = _now(ids.device) - start
    kept = cache_name(output)
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
