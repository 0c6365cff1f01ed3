"""GPTQ on the block walk: each layer is rounded on the inputs that the compressed blocks before it give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ao_core import BlockAlgorithm, OptionError, QParams, Scheme
from ao_core.calibrate import Hessian, Stage, matrices
from ao_gptq.gptq import gptq, output_error


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
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "rounds each column so that later columns make up for its error; any scheme"

    scheme: str | None = None
    percdamp: float = 0.01
    block_size: int = 128
    act_order: bool = False
    static_groups: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.percdamp, (int, float)) or not 0 <= self.percdamp <= 1:
            raise OptionError(f"gptq takes percdamp from 0 to 1, found {self.percdamp!r}.")
        if not isinstance(self.block_size, int) or isinstance(self.block_size, bool) or self.block_size < 1:
            raise OptionError(f"gptq takes block_size 1 or more, found {self.block_size!r}.")
        for option in ("act_order", "static_groups"):
            if not isinstance(value := getattr(self, option), bool):
                raise OptionError(f"gptq takes {option} true or false, found {value!r}.")

    def rejects(self, scheme: Scheme | None) -> str | None:
        """Layers without a scheme: there is nothing to round to."""
        return "it needs a scheme to round to, such as int4-weight-only" if scheme is None else None

    def visit(self, stage: Stage) -> None:
        """Quantize every layer of the stage that has a scheme."""
        names = [name for name in stage.layers if stage.schemes[name] is not None]
        for name, hessians in stage.collect(Hessian, names).items():
            scheme = stage.schemes[name]
            assert scheme is not None
            weight = stage.weight(name)
            scheme.check(weight)
            zeros = stage.zeros(name)
            pruned = [None] * len(hessians) if zeros is None else matrices(zeros)
            parts = zip(matrices(weight), hessians, pruned, strict=True)
            found = [self._rounded(*part, scheme) for part in parts]
            codes = torch.stack([codes for codes, _, _ in found]).view(weight.shape)
            qparams = {
                key: torch.stack([own[key] for _, own, _ in found]).view(*weight.shape[:-1], -1)
                for key in found[0][1]
            }
            provider = stage.providers.get(name)
            stage.replace(name, scheme.assemble(codes, qparams, dtype=weight.dtype, provider=provider))
            facts = [facts for _, _, facts in found]
            stage.note(name, **facts[0] if len(facts) == 1 else {"experts": facts})

    def _rounded(
        self, weight: torch.Tensor, hessian: Hessian, zeros: torch.Tensor | None, scheme: Scheme
    ) -> tuple[torch.Tensor, QParams, dict[str, Any]]:
        """Codes and parameters of a matrix ``[N, K]``, and what to say about them."""
        qparams = scheme.choose_qparams(weight)
        codes = scheme.encode(weight, qparams)
        if not hessian.tokens:
            return codes, qparams, {"gptq": "it saw no token, and was rounded to the nearest"}
        nearest = output_error(weight, scheme.decode(codes, qparams), hessian.value)
        solved = gptq(
            weight, hessian.value, scheme, percdamp=self.percdamp, block_size=self.block_size,
            act_order=self.act_order, static_groups=self.static_groups, zeros=zeros,
        )  # fmt: skip
        error = output_error(weight, scheme.decode(solved.codes, solved.qparams), hessian.value)
        facts = {"error_rounded": nearest, "error": error, "percdamp": solved.percdamp}
        if error < nearest:
            return solved.codes, solved.qparams, {"gptq": "done", **facts}
        return codes, qparams, {"gptq": "no better than rounding to the nearest, which was kept", **facts}
