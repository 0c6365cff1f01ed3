"""Gradients of layers' outputs, for labels that are drawn from the model's own predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ao_autoquant.logits import frozen, logits_of, rows_that_count
from ao_autoquant.modules import Call
from ao_autoquant.profile import detached, evaluating, run
from ao_core import Layer

SEGMENT = 128
"""Neighbouring rows whose errors are added up before they are squared."""
DRAWS = 2
"""Sets of labels: a backward pass each."""


@dataclass
class Pair:
    """One call of a layer's module, and the gradients of its output ``[..., t, N]``, one for each draw.

    ``segment``: how many neighbouring rows, along ``t``, are of one example.
    """

    call: Call
    gradients: list[torch.Tensor]
    segment: int = 1


def segments(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Sums over stretches of ``length`` of the last dimension, the last one shorter: ``[..., t]``."""
    fill = -rows.shape[-1] % length
    padded: torch.Tensor = F.pad(rows, (0, fill))
    return padded.reshape(*rows.shape[:-1], -1, length).sum(-1)


def is_linear(pair: Pair) -> bool:
    """Whether the output is ``x @ weight.T + bias`` of the one argument."""
    return type(pair.call.module) is nn.Linear and len(pair.call.args) == 1 and not pair.call.kwargs


def stretches(pair: Pair) -> int:
    """How many sums over ``segment`` rows there are."""
    examples, t, _ = _by_example(pair.gradients[0]).shape
    return examples * -(-t // pair.segment)


def squares_of(x: torch.Tensor, g: torch.Tensor, length: int) -> torch.Tensor:
    """``Σ (Σ g xᵀ)²`` ``[N, K]`` over stretches of ``x`` ``[..., t, K]`` and ``g`` ``[..., t, N]``."""
    total = torch.zeros(g.shape[-1], x.shape[-1], device=g.device)
    for rows, of in zip(_by_example(x.float()), _by_example(g.float()), strict=True):
        for own, its in zip(rows.split(length), of.split(length), strict=True):
            total += (its.t() @ own).square_()
    return total


def _by_example(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., t, N]``, or ``[N]``, as ``[examples, t, N]``."""
    rows = tensor if tensor.ndim > 1 else tensor[None]
    return rows.reshape(-1, *rows.shape[-2:])


def gradients(
    model: nn.Module, layers: Mapping[str, Layer], batches: Sequence[Any], *, seed: int = 0
) -> dict[str, list[Pair]]:
    """Each call of each layer's module, with the gradients of its output that come back.

    The gradients are those of the summed negative log-likelihood of labels that are drawn from the model's
    own predictions, ``DRAWS`` times. Parameters get no gradient, and the model is left as it was.

    Args:
        model: whose output holds logits.
        layers: whose modules return one tensor.
        batches: inputs of the model.
        seed: of the labels.

    Raises:
        ModelError: the model returns no logits.
    """
    draw = torch.Generator().manual_seed(seed)
    found: dict[str, list[Pair]] = {name: [] for name in layers}
    with evaluating(model), frozen(model), torch.enable_grad():
        for batch in batches:
            calls = _Calls(layers)
            with calls:
                logits = logits_of(run(model, batch))
            rows = rows_that_count(batch, logits).float()  # [rows, v]
            chances = rows.detach().softmax(-1).cpu()
            for _ in range(DRAWS if calls.leaves and rows.requires_grad else 0):
                labels = torch.multinomial(chances, 1, generator=draw)[:, 0].to(rows.device)
                loss = F.cross_entropy(rows, labels, reduction="sum")
                torch.autograd.grad(loss, calls.leaves, allow_unused=True, retain_graph=True)
            for name, pairs in calls.pairs.items():
                for pair in pairs:  # rows of a matrix are examples, unless the logits are of tokens
                    tokens = logits.ndim > 2 or any(g.ndim > 2 for g in pair.gradients)
                    pair.segment = SEGMENT if tokens else 1
                found[name] += [pair for pair in pairs if pair.gradients]
    return found


class _Calls:
    """Hooks that keep what layers see, and the gradients that come back; a context."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.pairs: dict[str, list[Pair]] = {name: [] for name in layers}
        self.leaves: list[torch.Tensor] = []
        self._layers, self._hooks = layers, list[Any]()

    def __enter__(self) -> None:
        for name, layer in self._layers.items():
            for module in {id(module): module for module, _ in layer.owners}.values():
                self._hooks.append(module.register_forward_hook(self._hook(name), with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
            if not isinstance(out, torch.Tensor):
                return out  # without a gradient it costs nothing here; what is measured says why
            if not out.requires_grad:  # the first on its path: everything before is constant
                leaf = out.detach().requires_grad_()
                self.leaves.append(leaf)
                out = leaf.clone()  # what follows may change it in place
            pair = Pair(Call(module, detached(args), detached(kwargs)), [])
            self.pairs[name].append(pair)

            def keep(g: torch.Tensor) -> None:
                pair.gradients.append(g.detach())

            out.register_hook(keep)
            return out

        return look
