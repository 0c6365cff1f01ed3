"""GPTQ on the block walk: each layer is rounded on the inputs that the compressed blocks before it give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from ao_core import BlockAlgorithm, OptionError, Scheme
from ao_core.calibrate import Hessian, Stage
from ao_gptq.layers import Found, Settings, column_problem, jobs_of, solve
from ao_gptq.spread import spread


@dataclass(frozen=True)
class Gptq(BlockAlgorithm):
    """Round weights column by column, each error made up for by the columns after it (arXiv 2210.17323).

    Attributes:
        scheme: to quantize with; by default the plan's.
        percdamp: added to the Hessian's diagonal, as a share of its mean; ten times as much is tried as
            long as it has no Cholesky factor, and the report says so.
        block_size: columns whose errors are handed on together.
        act_order: columns with the largest inputs first; parameters are then fixed before.
        static_groups: fix the parameters of all groups before the first column.
        mse: search multiples of the scheme's parameters for the least error, large inputs counting more.
        true_sequential: within a block, let each layer see what the quantized ones before it give. Runs
            the block once for each group of layers that share an input.
        asymmetric: from 0 to 1: how much of what the inputs lack of the float model's the weights make up
            for (the aim of GPTAQ, arXiv 2504.02692). Above 0 the float model's hidden states are kept too.
        min_tokens: experts that saw fewer share one Hessian, that of all tokens of their stack.
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "rounds each column so that later columns make up for its error; any scheme"
    shares: ClassVar[bool] = True

    scheme: str | None = None
    percdamp: float = 0.01
    block_size: int = 128
    act_order: bool = True
    static_groups: bool = False
    mse: bool = True
    true_sequential: bool = False
    asymmetric: float = 0.0
    min_tokens: int = 128

    def __post_init__(self) -> None:
        for option in ("percdamp", "asymmetric"):
            value = getattr(self, option)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                raise OptionError(f"gptq takes {option} from 0 to 1, found {value!r}.")
        for option in ("block_size", "min_tokens"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"gptq takes {option} 1 or more, found {value!r}.")
        for option in ("act_order", "static_groups", "mse", "true_sequential"):
            if not isinstance(value := getattr(self, option), bool):
                raise OptionError(f"gptq takes {option} true or false, found {value!r}.")

    @property
    def pairs(self) -> bool:
        """See :class:`~ao_core.BlockAlgorithm`."""
        return self.asymmetric > 0

    def rejects(self, scheme: Scheme | None) -> str | None:
        """Layers without a scheme, and schemes that can't encode a column by itself."""
        if scheme is None:
            return "it needs a scheme to round to, such as int4-weight-only"
        return column_problem(scheme)

    def check(self, schemes: Mapping[str, Scheme | None]) -> None:
        """See :class:`~ao_core.BlockAlgorithm`; any scheme that can't encode a column is refused."""
        super().check(schemes)
        for name, scheme in schemes.items():
            if scheme is not None and (reason := column_problem(scheme)):
                raise OptionError(f"gptq can't round {name!r}: {reason}. Leave it out, or to another scheme.")

    def visit(self, stage: Stage) -> None:
        """Quantize every layer of the stage that has a scheme."""
        settings = Settings(
            self.percdamp, self.block_size, self.act_order, self.static_groups, self.mse, self.asymmetric,
            self.min_tokens,
        )  # fmt: skip
        for names in self._turns(stage):
            seen = stage.schemes[names[0]].quantize_input  # type: ignore[union-attr]
            hessians: Mapping[str, Sequence[Hessian]] = (
                stage.collect_pairs(names, seen)
                if self.asymmetric
                else stage.collect(partial(Hessian, seen=seen), names)
            )
            weights = {name: stage.weight(name) for name in names}
            for name, weight in weights.items():
                stage.schemes[name].check(weight)  # type: ignore[union-attr]
            zeros = {name: mask for name in names if (mask := stage.zeros(name)) is not None}
            jobs = jobs_of(
                {name: (weights[name], hessians[name], stage.schemes[name]) for name in names}, zeros
            )
            del hessians  # each goes when its job is done
            for found in spread(jobs, partial(solve, settings=settings)):
                self._put(stage, found, weights[found.name].dtype)

    def _turns(self, stage: Stage) -> Iterator[list[str]]:
        """Layers with a scheme, all at once or in the order in which their inputs depend on each other.

        Those whose schemes quantize activations otherwise see other inputs, and have a turn of their own.
        """
        left = [name for name in stage.layers if stage.schemes[name] is not None]
        groups = [list(group) for group in stage.groups] if self.true_sequential else []
        for group in [*groups, left]:
            turns: dict[str, list[str]] = {}
            for name in [name for name in group if name in left]:
                scheme = stage.schemes[name]
                assert scheme is not None
                turns.setdefault("" if scheme.weight_only else str(scheme), []).append(name)
            for names in turns.values():
                yield names
                left = [name for name in left if name not in names]

    @staticmethod
    def _put(stage: Stage, found: Found, dtype: torch.dtype) -> None:
        scheme = stage.schemes[found.name]
        assert scheme is not None
        provider = stage.providers.get(found.name)
        stage.replace(found.name, scheme.assemble(found.codes, found.qparams, dtype=dtype, provider=provider))
        facts: dict[str, Any] = found.facts[0] if len(found.facts) == 1 else {"experts": found.facts}
        stage.note(found.name, **facts)
