"""Calling a causal language model: its tokens, options, cache and modes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ao_core.errors import ModelError, OptionError

_CACHES = ("cache", "past_key_values")  # from transformers 5.24 or so on, and before


def check_tokens(model: nn.Module, tokens: Tensor, *, needed: int, positions: int) -> None:
    """Raise unless ``tokens`` are integers ``[n]``, n ≥ ``needed``, that the model has logits for.

    Raises:
        OptionError: ``positions`` at once are more than the model has.
        ModelError: tokens of another form, too few of them or outside the vocabulary.
    """
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


def cache_name(output: Any) -> str | None:
    """How a Hugging Face model calls the cache, in its ``output`` and as an argument; None without one."""
    return next((name for name in _CACHES if getattr(output, name, None) is not None), None)


def accepted(model: nn.Module, **wanted: object) -> dict[str, Any]:
    """Those of ``wanted`` that the model's forward takes by name."""
    original: Any = getattr(model, "_orig_mod", model)  # torch.compile hides the signature
    names = inspect.signature(original.forward).parameters
    return {name: value for name, value in wanted.items() if name in names}


def device_of(model: nn.Module, tokens: Tensor) -> torch.device:
    """Where the model lies; one without parameters and buffers, where ``tokens`` are."""
    return next(iter((*model.parameters(), *model.buffers())), tokens).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the mode that each module had afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
