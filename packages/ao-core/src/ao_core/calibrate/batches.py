"""Calibration batches: inputs of a model, each in a form that it can be called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ao_core.errors import ModelError, OptionError


def as_batches(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list: tensors, tuples of positional or mappings of keyword arguments.

    Raises:
        OptionError: there is none, it is a single batch, or one is of another type.
    """
    if isinstance(batches, (torch.Tensor, Mapping, str)):
        raise OptionError(f"batches must be a list of them, and is one {_kind(batches)}: put it in a list.")
    found = list(batches)
    if not found:
        raise OptionError("calibration needs at least one batch, and the list of batches is empty.")
    for index, batch in enumerate(found):
        if not isinstance(batch, (torch.Tensor, tuple, list, Mapping)):
            raise OptionError(
                f"batch {index} is a {_kind(batch)}; give a tensor, a tuple of positional arguments or a "
                "mapping of keyword arguments, such as a tokenizer returns."
            )
    return found


def check_tokens(model: nn.Module, batches: Iterable[Any]) -> None:
    """Raise unless a Hugging Face model can take the token ids ``[b, t]`` among ``batches``.

    Raises:
        ModelError: a sequence is longer than the model's positions, or an id lies outside its embedding.
    """
    find: Any = getattr(model, "get_input_embeddings", None)
    embedding = None if find is None else find()
    rows = getattr(embedding, "num_embeddings", None)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for index, batch in enumerate(batches):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        ids = ids[0] if isinstance(ids, (tuple, list)) and ids else ids
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.ndim != 2 or not ids.numel():
            continue
        if isinstance(positions, int) and ids.shape[1] > positions:
            raise ModelError(
                f"batch {index} holds sequences of {ids.shape[1]} tokens, and the model takes {positions} at "
                "most. Cut them shorter (on the command line by --context, or --prefill)."
            )
        low, high = (int(bound) for bound in ids.aminmax())
        if isinstance(rows, int) and (low < 0 or high >= rows):
            raise ModelError(
                f"batch {index} holds token {low if low < 0 else high}, and the model's vocabulary has "
                f"{rows} tokens, from 0. Use the tokenizer that the model was trained with."
            )


def call(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """Run ``model`` on ``batch`` moved to ``device``, without a cache of keys and values."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if isinstance(batch, Mapping):
        return model(**{**options, **moved(dict(batch), device)})
    arguments = batch if isinstance(batch, (tuple, list)) else (batch,)
    return model(*moved(tuple(arguments), device), **options)


def padding_mask(batch: Any) -> torch.Tensor | None:
    """Which positions ``[b, t]`` hold tokens and not padding, where the batch says so; else None."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.is_floating_point():
        return None
    found = mask != 0
    return None if bool(found.all()) else found


def mapped(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``tree`` with ``change`` applied to each tensor in its tuples, lists and dicts."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(value, change) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(value, change) for value in tree)
    return tree


def moved(tree: Any, device: torch.device) -> Any:
    """``tree`` with its tensors on ``device``."""
    return mapped(tree, lambda tensor: tensor.to(device))


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors in tuples, lists and mappings, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [found for value in tree.values() for found in tensors(value)]
    if isinstance(tree, (tuple, list)):
        return [found for value in tree for found in tensors(value)]
    return []


def _kind(value: Any) -> str:
    return type(value).__name__
