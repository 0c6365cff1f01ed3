"""What a search should measure on one layer: every installed scheme, and what plugins propose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ao_core.plugins import manager
from ao_core.registry import Source
from ao_core.scheme import SCHEMES, Scheme


@dataclass(frozen=True)
class Proposals:
    """What to measure on a layer.

    Attributes:
        schemes: text of a scheme → the scheme, sorted.
        faults: plugin → why what it proposes is not used.
    """

    schemes: dict[str, Scheme]
    faults: dict[str, str] = field(default_factory=dict)


def propose(fqn: str, weight: torch.Tensor, sample: torch.Tensor | None = None) -> Proposals:
    """Every installed scheme with its defaults, and what the hook ``ao_propose_schemes`` adds.

    A plugin whose hook raises, or returns anything but schemes, is named in the result and the others count.

    Args:
        fqn: the layer's qualified name.
        weight: its float weight ``[..., N, K]``.
        sample: some of its inputs ``[rows, K]``, or None.
    """
    found = {str(made): made for made in (entry.item() for entry in SCHEMES.entries().values())}
    faults: dict[str, str] = {}
    for name, answer in _answers(fqn, weight, sample):
        if isinstance(answer, Exception):
            faults[name] = f"ao_propose_schemes raised {type(answer).__name__}: {answer}"
        elif not isinstance(answer, (list, tuple)) or not all(isinstance(each, Scheme) for each in answer):
            faults[name] = f"ao_propose_schemes must return a list of schemes, and returned {answer!r:.80}"
        else:
            found |= {str(scheme): scheme for scheme in answer}
    return Proposals(dict(sorted(found.items())), faults)


def scheme_source(scheme: Scheme) -> Source | None:
    """Who provides ``scheme``; None if it is not installed."""
    entries = SCHEMES.entries()
    return entries[scheme.name].source if scheme.name in entries else None


def _answers(
    fqn: str, weight: torch.Tensor, sample: torch.Tensor | None
) -> Iterator[tuple[str, object | Exception]]:
    everyone = manager()
    providers = {impl.plugin_name: impl.plugin for impl in everyone.hook.ao_propose_schemes.get_hookimpls()}
    for name in sorted(providers):
        others = [plugin for other, plugin in providers.items() if other != name]
        ask = everyone.subset_hook_caller("ao_propose_schemes", others)
        try:
            answers = ask(fqn=fqn, weight=weight.detach(), sample=sample)
        except Exception as error:  # noqa: BLE001 - a stranger's code: the result names it
            yield name, error
        else:
            yield from ((name, answer) for answer in answers)
