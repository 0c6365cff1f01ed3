"""What a model predicts: its logits, which positions count, how far two predictions lie apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ao_autoquant.profile import evaluating, run
from ao_core import ModelError
from ao_core.calibrate import tensors

_ROWS = 512  # of logits that go through a softmax together


def logits_of(output: Any) -> torch.Tensor:
    """The logits ``[..., v]`` in what a model returned: ``.logits``, ``["logits"]``, or its first tensor.

    Raises:
        ModelError: there are none: hidden states, probabilities, integers, a single class.
    """
    advice = "The measures 'loss' and 'kl' compare predictions; take error='output' for this model."
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and (isinstance(output, Mapping) or hasattr(output, "last_hidden_state")):
        names = ", ".join(map(str, output)) if isinstance(output, Mapping) else "last_hidden_state"
        raise ModelError(f"the model returned {type(output).__name__} ({names}), and no logits. {advice}")
    if found is None:
        found = next(iter(tensors(output)), None)
    if not isinstance(found, torch.Tensor):
        raise ModelError(f"the model returned {type(output).__name__}, which holds no tensor. {advice}")
    if not found.is_floating_point() or found.ndim < 2 or found.shape[-1] < 2:
        raise ModelError(
            f"the model returned {found.dtype} {tuple(found.shape)}, and no logits [..., classes]. {advice}"
        )
    values = found.detach()
    if not bool(torch.isfinite(values).all()):
        raise ModelError("the model returned NaN or infinity on the examples; look for a damaged weight.")
    rows = values.reshape(-1, values.shape[-1])[:_ROWS].float()
    if bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < 1e-2).all()):
        raise ModelError(
            f"the model returned probabilities {tuple(found.shape)}: each row sums to 1. Return the logits "
            "before the softmax, or take error='output'."
        )
    return found


def counted(batch: Any, logits: torch.Tensor) -> torch.Tensor:
    """Which rows of ``logits`` ``[..., v]`` count, as indices: all but those of padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    count = logits.numel() // logits.shape[-1]
    if isinstance(mask, torch.Tensor) and mask.shape == logits.shape[:-1]:
        return mask.reshape(-1).ne(0).nonzero()[:, 0].to(logits.device)
    return torch.arange(count, device=logits.device)


def predictions(model: nn.Module, batch: Any) -> torch.Tensor:
    """The logits ``[..., v]``, without gradients, in evaluation mode."""
    with evaluating(model), torch.no_grad():
        return logits_of(run(model, batch))


def rows_that_count(batch: Any, logits: torch.Tensor) -> torch.Tensor:
    """The rows ``[rows, v]`` of ``logits`` without those of padding."""
    return logits.reshape(-1, logits.shape[-1])[counted(batch, logits)]


def divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Sum over the rows of ``KL(softmax(reference) ‖ softmax(found))`` in nats; logits ``[rows, v]``.

    Both sum up to 1, so that it is ``Σ q - p - p d`` too, with ``d = log q - log p``: of second order in
    ``d`` term by term, and in float32 a small divergence does not drown in rounding. Infinite where ``found``
    holds NaN.
    """
    total = 0.0
    for one, other in zip(reference.split(_ROWS), found.split(_ROWS), strict=True):
        p, q = (each.float().log_softmax(-1) for each in (one, other))
        d = q - p
        terms = torch.where(d.abs() < 1, p.exp() * (d.expm1() - d), q.exp() - p.exp() * (1 + d))
        total += float(terms.sum(-1).double().sum())
    return total if total == total else float("inf")  # noqa: PLR0124 - NaN


def next_token_nll(batch: Any, logits: torch.Tensor) -> torch.Tensor | None:
    """The loss of each next token ``[scored]`` in nats, where the batch holds token ids; else None.

    Args:
        batch: with ids ``[b, t]``, its first tensor or ``input_ids``.
        logits: ``[b, t, v]`` of the whole batch.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else next(iter(tensors(batch)), None)
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.shape != logits.shape[:-1]:
        return None
    if ids.ndim != 2 or ids.shape[1] < 2 or int(ids.max()) >= logits.shape[-1]:
        return None
    counts = torch.zeros(ids.numel(), dtype=torch.bool, device=logits.device)
    counts[counted(batch, logits)] = True
    scored = counts.view(ids.shape)[:, 1:]
    targets = ids[:, 1:].to(logits.device)[scored]
    return F.cross_entropy(logits[:, :-1][scored].float(), targets.long(), reduction="none")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; each is put back as it was."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad = True
