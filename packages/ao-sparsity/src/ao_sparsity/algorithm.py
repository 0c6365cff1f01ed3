"""Pruning on the block walk: magnitude, Wanda, SparseGPT."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from ao_core import BlockAlgorithm, OptionError, PlanError, Rule
from ao_core.calibrate import Collector, Hessian, SquaredNorm, Stage, matrices
from ao_core.numerics.hessian import output_error
from ao_sparsity.masks import Level, Per, least, zeros_first
from ao_sparsity.sparsegpt import sparsegpt
from ao_sparsity.wanda import magnitude_scores, wanda_scores

logger = logging.getLogger(__name__)
_UNSEEN = "no token reached it: pruned by magnitude"


@dataclass(frozen=True)
class Pruning(BlockAlgorithm):
    """What all pruning algorithms share: how much becomes zero, and where.

    Zeros that are there already count: pruning a second time does not go beyond the level. Weights that
    are pruned stay zero through the algorithms and the scheme that follow in the same walk.

    Attributes:
        sparsity: the share of weights that become zero, from 0 to below 1; 0.5 unless ``pattern`` is given.
        pattern: ``"n:m"``: of each m neighbouring columns n stay. If m does not divide the columns, those
            that the last group lacks count as zeros.
        per: whether unstructured weights are compared within their ``"row"`` or over the ``"layer"``.
        rules: other levels for some layers: a text such as ``"*down_proj=0.3 *v_proj=2:4 *k_proj=0"``, or
            pairs of a pattern (see :class:`ao_core.Rule`) and a level. The first that matches wins.
    """

    sparsity: float | None = None
    pattern: str | None = None
    per: Per = "row"
    rules: str | Sequence[tuple[str, float | str]] | Mapping[str, float | str] = ()

    def __post_init__(self) -> None:
        self._levels  # noqa: B018 - raises if an option is out of range

    @property
    def level(self) -> Level:
        """That of the layers that no rule names."""
        if self.pattern is None:
            return Level.parse(0.5 if self.sparsity is None else self.sparsity, self.per)
        level = Level.parse(self.pattern, self.per)
        if not level.m:
            raise OptionError(f"{self.name} takes pattern n:m such as 2:4, and was given {self.pattern!r}.")
        if self.sparsity is not None and abs(self.sparsity - level.sparsity) > 1e-9:
            raise OptionError(
                f"pattern {self.pattern} makes {level.sparsity:g} of the weights zero, and sparsity="
                f"{self.sparsity!r} was asked for. Give one of the two."
            )
        return level

    @cached_property
    def _levels(self) -> list[tuple[Rule, Level]]:
        """Every rule with its level; the last one is for all layers."""
        pairs = self.rules.items() if isinstance(self.rules, Mapping) else self.rules
        if isinstance(pairs, str):
            words = pairs.strip("()[]").split()
            if bad := [word for word in words if "=" not in word]:
                raise OptionError(f"rules read PATTERN=LEVEL PATTERN=LEVEL, and {bad[0]!r} has no '='.")
            pairs = [tuple(word.rsplit("=", 1)) for word in words]  # type: ignore[misc]
        listed = [(Rule(pattern, None), Level.parse(level, self.per)) for pattern, level in pairs]
        return [*listed, (Rule("*", None), self.level)]

    def level_of(self, name: str) -> Level:
        """The level of the layer called ``name``."""
        return next(level for rule, level in self._levels if rule.matches(name))

    def check_layers(self, layers: Mapping[str, Any]) -> None:
        """Raise unless every rule matches a layer.

        Raises:
            PlanError: one matches none.
        """
        for rule, _ in self._levels[:-1]:
            if not any(map(rule.matches, layers)):
                raise PlanError(
                    f"rule {rule.pattern!r} of {self.name} matches none of the {len(layers)} layers that are "
                    f"compressed ({', '.join([*layers][:3])}, ...). Patterns match the whole name."
                )

    def visit(self, stage: Stage) -> None:
        """Prune every layer of the stage to its level."""
        levels = {name: level for name in stage.layers if (level := self.level_of(name)).sparsity}
        seen = self._statistics(stage, list(levels))
        for name, level in levels.items():
            weight = stage.weight(name)
            before = float((weight == 0).sum()) / weight.numel()
            statistics = seen.get(name) or [None] * len(matrices(weight))
            found = [self._one(*pair, level) for pair in zip(matrices(weight), statistics, strict=True)]
            pruned = torch.stack([part for part, _ in found]).view(weight.shape).to(weight.dtype)
            stage.replace(name, pruned)
            stage.fix_zeros(name, pruned == 0)
            facts = [dict(facts) for _, facts in found]
            own = facts[0] if len(facts) == 1 else {"experts": facts}
            after = float((pruned == 0).sum()) / pruned.numel()
            stage.note(name, level=str(level), sparsity_before=before, sparsity=after, **own)
            if any("pruned" in each for each in facts):
                logger.warning("layer %s: %s", name, _UNSEEN)

    def _statistics(self, stage: Stage, names: list[str]) -> Mapping[str, Sequence[Any]]:
        """What the layers saw, where that counts: layer → a collector for each matrix."""
        return {}

    def _one(
        self, weight: torch.Tensor, seen: Collector | None, level: Level
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        if seen is not None and not seen.tokens:
            return _without(weight, magnitude_scores, level), {"pruned": _UNSEEN}
        return self.prune(weight, seen, level)

    @abstractmethod
    def prune(self, weight: torch.Tensor, seen: Any, level: Level) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """``weight`` ``[N, K]`` with zeros, and facts for the report.

        Args:
            weight: float ``[N, K]``.
            seen: a collector of at least one token, or None where inputs don't count.
            level: how much becomes zero.
        """


@dataclass(frozen=True)
class Magnitude(Pruning):
    """Zero the smallest weights, without looking at inputs."""

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "zeros the smallest weights"

    def prune(self, weight: torch.Tensor, seen: None, level: Level) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """See :meth:`Pruning.prune`."""
        return _without(weight, magnitude_scores, level), {}


@dataclass(frozen=True)
class Calibrated(Pruning):
    """Pruning that looks at what layers see.

    Attributes:
        sequential: whether a block sees what the pruned blocks before it give; else all see what the float
            model's blocks do, whose hidden states are then kept too.
    """

    collector: ClassVar[type[Collector]]

    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sequential, bool):
            raise OptionError(f"{self.name} takes sequential true or false, found {self.sequential!r}.")

    @property
    def pairs(self) -> bool:
        """See :class:`~ao_core.BlockAlgorithm`."""
        return not self.sequential

    def _statistics(self, stage: Stage, names: list[str]) -> Mapping[str, Sequence[Any]]:
        return stage.collect(self.collector, names, floats=not self.sequential)


@dataclass(frozen=True)
class Wanda(Calibrated):
    """Zero the weights with the least ``|W| · ‖X‖₂``; the others stay as they are (arXiv 2306.11695).

    Attributes:
        squared: rank by ``|W| · ‖X‖₂²``; with ``per="layer"`` what torchao did in April 2024.
    """

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "zeros the weights with the least |W| times the norm of their input"
    collector = SquaredNorm

    squared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.squared, bool):
            raise OptionError(f"wanda takes squared true or false, found {self.squared!r}.")

    def prune(
        self, weight: torch.Tensor, seen: SquaredNorm, level: Level
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """See :meth:`Pruning.prune`."""
        norm = seen.value.to(weight.device)
        return _without(weight, lambda w: wanda_scores(w, norm, squared=self.squared), level), {}


@dataclass(frozen=True)
class SparseGpt(Calibrated):
    """Zero weights column by column, and let the later columns make up for it (arXiv 2301.00774).

    Attributes:
        per: ``"layer"``, as in the paper: rows are compared with each other, within a block of columns.
        percdamp: added to the Hessian's diagonal, as a share of its mean; ten times as much is tried as
            long as it has no Cholesky factor, and the report says so.
        block_size: columns whose masks are chosen together.
    """

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "zeros weights column by column; later columns make up for the error"
    collector = Hessian

    per: Per = "layer"
    percdamp: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.percdamp, (int, float)) or not 0 <= self.percdamp <= 1:
            raise OptionError(f"sparsegpt takes percdamp from 0 to 1, found {self.percdamp!r}.")
        if not isinstance(self.block_size, int) or isinstance(self.block_size, bool) or self.block_size < 1:
            raise OptionError(f"sparsegpt takes block_size 1 or more, found {self.block_size!r}.")

    def prune(
        self, weight: torch.Tensor, seen: Hessian, level: Level
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """See :meth:`Pruning.prune`."""
        hessian = seen.value.to(weight.device)
        found = sparsegpt(weight, hessian, level, percdamp=self.percdamp, block_size=self.block_size)
        error = output_error(weight, found.weight, hessian)
        return found.weight, {"error": error, "percdamp": found.percdamp}


def _without(
    weight: torch.Tensor, scores: Callable[[torch.Tensor], torch.Tensor], level: Level
) -> torch.Tensor:
    return weight.masked_fill(least(zeros_first(weight, scores(weight)), level), 0)
