"""One layer while its candidates are measured: what they share is made once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ao_autoquant.measure import Digests, Quality, Reference, Time, digest
from ao_autoquant.modules import module_quality, module_time, module_values
from ao_autoquant.profile import Seen

_ROWS = 4096  # of a matrix on which a scheme is tried; an embedding has many more


@dataclass(eq=False)
class Subject:
    """A layer and what it saw.

    Attributes:
        name: of the layer.
        seen: what it saw.
        digests: of the model's tensors, as far as they were read before.
    """

    name: str
    seen: Seen
    digests: Digests

    @cached_property
    def weight(self) -> torch.Tensor:
        """``[N, K]``, or ``[E, N, K]`` of experts."""
        return self.seen.layer.weight.detach()

    @cached_property
    def reference(self) -> Reference:
        """Of a linear: its weight, some of its inputs, its bias."""
        return Reference(self.weight, self.seen.sample, self.seen.bias)

    @cached_property
    def matrix(self) -> Reference:
        """Of a weight that is measured with its module: rows of one matrix, and inputs that fit it."""
        matrix = self.weight.flatten(0, -3)[0] if self.weight.ndim > 2 else self.weight
        return Reference(matrix[:_ROWS], torch.randn_like(matrix[:8]), None)

    @cached_property
    def values(self) -> dict[str, str]:
        """What errors depend on, as texts."""
        if self.seen.by_module:
            return module_values(self.seen, self.digests)
        return {"weight": self.digests(self.seen.layer.weight), "sample": digest(self.reference.sample)}

    @cached_property
    def outputs(self) -> list[torch.Tensor]:
        """What the module returns with its own weights, of each call that is kept."""
        return [call() for call in self.seen.inputs.values()]

    def module_quality(self, weight: torch.Tensor) -> Quality:
        """What the module returns with ``weight``, beside that."""
        return module_quality(self.seen.layer, weight, list(self.seen.inputs.values()), self.outputs)

    def module_time(self, weight: torch.Tensor, rows: int) -> Time:
        """Of the module with ``weight``."""
        return module_time(self.seen.layer, weight, self.seen.inputs[rows])
