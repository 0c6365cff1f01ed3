"""torchao's names of April 2024 for sparsity, with the paper's arithmetic; the old one where it is asked for.

In torchao the metric was ``|W| · Σ x²``, compared over the whole layer, and repeated steps pruned more.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.ao.pruning import BaseSparsifier  # type: ignore[attr-defined]

from ao_core import ModelError
from ao_core.calibrate import SquaredNorm
from ao_sparsity.masks import Level, least, zeros_first
from ao_sparsity.wanda import magnitude_scores, wanda_scores

logger = logging.getLogger(__name__)


class PerChannelNormObserver(nn.Module):
    """Watches inputs ``[..., K]`` (also ``[K]``) and keeps the norm of each column; returns them as they are.

    Integer inputs, as an embedding has, are not counted.

    Args:
        squared: let :attr:`norm` be the sum of squares, as in torchao.

    Attributes:
        integers: whether integer inputs were seen.
    """

    def __init__(self, *, squared: bool = False) -> None:
        super().__init__()
        self.squared, self.integers = squared, False
        self.collector: SquaredNorm | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take in ``x``."""
        if not x.is_floating_point():
            self.integers = True
            return x
        if self.collector is None:
            self.collector = SquaredNorm(x.shape[-1], x.device)
        self.collector.update(x)
        return x

    @property
    def norm(self) -> torch.Tensor:
        """``‖x_j‖₂``, or its square: float32 ``[K]``; empty before the first input."""
        if self.collector is None:
            return torch.empty(0)
        return self.collector.value if self.squared else self.collector.value.sqrt()


class WandaSparsifier(BaseSparsifier):
    """Wanda in three calls: ``prepare``, the model on some data, ``step``; ``squash_mask`` makes it last.

    All linears see the inputs of the float model; ``ao_core.compress_(model, "wanda", batches)`` prunes block
    by block instead. Every step finds the mask anew from the unpruned weight.

    Args:
        sparsity_level: the share of weights that become zero, in [0, 1).
        semi_structured_block_size: b: half (rounded down) of each b neighbouring columns, 4 for 2:4; then
            ``sparsity_level`` is not looked at.
        torchao_2024: rank as torchao did: by ``|W| · Σ x²``, over the whole layer.

    Raises:
        OptionError: a level or block size out of its range.
    """

    def __init__(
        self,
        sparsity_level: float = 0.5,
        semi_structured_block_size: int | None = None,
        *,
        torchao_2024: bool = False,
    ) -> None:
        self.torchao_2024 = torchao_2024
        defaults = {
            "sparsity_level": sparsity_level,
            "semi_structured_block_size": semi_structured_block_size,
        }
        self._level(sparsity_level, semi_structured_block_size)
        self._hooks: list[Any] = []
        super().__init__(defaults=defaults)

    def prepare(self, model: nn.Module, config: list[dict[str, Any]] | None = None) -> None:
        """Put a mask on the weights, and an observer on the inputs of their modules.

        Args:
            model: changed in place.
            config: mappings with ``tensor_fqn`` and, if they differ from the defaults, ``sparsity_level`` and
                ``semi_structured_block_size``; by default all ``nn.Linear``.
        """
        super().prepare(model, config)  # type: ignore[no-untyped-call]
        for group in self.groups:
            self._level(group["sparsity_level"], group["semi_structured_block_size"])
            module = group["module"]
            module.activation_post_process = PerChannelNormObserver(squared=self.torchao_2024)
            self._hooks.append(module.register_forward_pre_hook(_observe))

    def step(self, use_path: bool = True) -> None:
        """Find the masks.

        Raises:
            ModelError: no input has reached any of the modules yet.
        """
        observers = [group["module"].activation_post_process for group in self.groups]
        if not any(each.collector is not None or each.integers for each in observers):
            raise ModelError(
                "no input has reached any of the prepared modules. Run the model on calibration data between "
                "prepare() and step()."
            )
        super().step(use_path)

    def update_mask(  # type: ignore[override]
        self,
        module: nn.Module,
        tensor_name: str,
        sparsity_level: float,
        semi_structured_block_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the mask of one weight; that of a module with integer inputs is left alone."""
        observer: Any = module.activation_post_process
        parametrized: Any = module.parametrizations
        weight, mask = parametrized[tensor_name].original, parametrized[tensor_name][0].mask
        if observer.integers:
            return
        if observer.collector is None:
            logger.warning("no input reached %s: pruned by magnitude", kwargs.get("tensor_fqn", tensor_name))
            scores = magnitude_scores(weight)
        else:
            norm = observer.collector.value.to(weight.device)
            scores = wanda_scores(weight, norm, squared=self.torchao_2024)
        level = self._level(sparsity_level, semi_structured_block_size)
        mask.data.copy_(~least(zeros_first(weight, scores), level))

    def squash_mask(self, *args: Any, **kwargs: Any) -> None:
        """Write the zeros into the weights; masks and observers are taken off."""
        super().squash_mask(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for group in self.groups:
            if hasattr(group["module"], "activation_post_process"):
                del group["module"].activation_post_process

    def _level(self, sparsity_level: float, semi_structured_block_size: int | None) -> Level:
        if semi_structured_block_size:
            size = semi_structured_block_size
            return Level.parse(f"{size - size // 2}:{size}")
        return Level(sparsity_level, per="layer" if self.torchao_2024 else "row")


def _observe(module: nn.Module, args: tuple[Any, ...]) -> None:
    observer: Any = module.activation_post_process
    observer(args[0])
