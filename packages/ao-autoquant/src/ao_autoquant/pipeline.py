"""``autoquant``: explore, choose, check on the whole model, and convert by rounding or by an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ao_autoquant.check import PLAN, Checked, checked, growth, token_losses
from ao_autoquant.exploration import Exploration, explore
from ao_autoquant.profile import as_examples, example_weights
from ao_autoquant.refine import algorithms_of, refine_
from ao_autoquant.search import Budget, Objective, checked_objective
from ao_core import Algorithm, Plan, Report, apply_

Algorithms = str | Algorithm | Sequence[str | Algorithm]


@dataclass(frozen=True)
class Outcome:
    """What came of an exploration.

    Attributes:
        chosen: layer → candidate.
        plan: the same as a plan, with what was measured.
        checked: the plan on the whole model, where that was asked for.
        report: of the conversion, if the model was converted.
    """

    chosen: dict[str, str]
    plan: Plan
    checked: Checked | None = None
    report: Report | None = None


def autoquant(
    model: nn.Module,
    examples: Any,
    *,
    objective: Objective = "latency",
    max_error: float | None = None,
    max_bytes: float | None = None,
    max_latency: float | None = None,
    min_speedup: float | None = None,
    together: Sequence[Sequence[str]] = (),
    check: bool = False,
    held: Any = None,
    refine: Algorithms | None = None,
    apply: bool = False,
    **options: Any,
) -> Plan:
    """Measure every installed scheme on every layer of ``model`` and return the best plan.

    ``model`` is unchanged unless ``apply`` is true or ``refine`` is given.

    Args:
        model: any module, on the device that it will run on.
        examples: its inputs, see :func:`~ao_autoquant.explore`.
        objective: what to make small: ``"latency"``, ``"bytes"`` or ``"error"``.
        max_error: root mean square over the layers of their relative output errors, at most; with
            ``error="loss"`` or ``"kl"``, the nats that the plan costs, at most.
        max_bytes: of the whole model, at most.
        max_latency: microseconds of the searched layers for one run of the examples, at most.
        min_speedup: of the searched layers against float, at least.
        together: groups of patterns whose layers get the same scheme, such as
            ``[["*.q_proj", "*.k_proj", "*.v_proj"]]``.
        check: measure the plan on the whole model. If it costs more nats than ``max_error``, others are
            chosen until one keeps to it. Uniform schemes that fit and could be better are measured too, and
            the best one is kept. What was predicted and measured is in the plan's ``evidence``.
        held: inputs to check on, better others than the search saw; by default ``calibration``, else the
            examples.
        refine: algorithms that carry the plan out with data, such as ``"gptq"``, as for
            :func:`ao_core.compress_`; on ``calibration``, else the examples. Converts the model.
        apply: convert the model along the plan.
        **options: of :func:`~ao_autoquant.explore`.

    Raises:
        InfeasibleError: no plan fits; says which constraint, and what is reachable.
        UnknownNameError: an algorithm is not installed; says what to install.
        OptionError, ModelError: as for :func:`~ao_autoquant.explore`.

    The model is unchanged if it raises.
    """
    checked_objective(objective)
    budget = Budget(max_error, max_bytes, max_latency, min_speedup)
    if refine is not None:
        algorithms_of(refine)  # a missing one ends here, before anything is measured
    found = explore(model, examples, **options)
    return carry_out(
        model, found, examples, weights=options.get("weights"), calibration=options.get("calibration"),
        objective=objective, budget=budget, together=together, check=check, held=held, refine=refine,
        apply=apply, progress=options.get("progress", False),
    ).plan  # fmt: skip


def carry_out(
    model: nn.Module,
    found: Exploration,
    examples: Any,
    *,
    weights: Sequence[float] | None = None,
    calibration: Any = None,
    objective: Objective = "latency",
    budget: Budget | None = None,
    together: Sequence[Sequence[str]] = (),
    check: bool = False,
    held: Any = None,
    refine: Algorithms | None = None,
    apply: bool = False,
    progress: bool = False,
) -> Outcome:
    """Choose from what was found, and do with the choice what :func:`autoquant` says."""
    budget = budget or Budget()
    batches = as_examples(examples if calibration is None else calibration)
    examples = as_examples(examples)
    kept = batches if held is None else as_examples(held)
    result: Checked | None = None
    if check:
        chosen, result = checked(
            model, found, objective=objective, budget=budget, together=together, held=kept, examples=examples,
            counts=example_weights(weights, len(examples)),
        )  # fmt: skip
    else:
        chosen = found.choose(objective, budget, together)
    uniform = None if result is None or result.kept == PLAN else result.kept
    plan = found.plan_for(chosen, objective, uniform=uniform)
    if result is not None:
        plan = replace(plan, evidence={"error_measure": found.measure, "check": asdict(result)})
    converts = any(choice.scheme for choice in plan.layers.values())
    if refine is not None and converts:
        before = token_losses(model, kept) if check else []
        report = refine_(model, plan, refine, batches, progress=progress)
        plan = report.plan
        if check:
            nll, se = growth(before, token_losses(model, kept))
            plan = replace(plan, evidence={**plan.evidence, "refined": {"nll": nll, "nll_se": se}})
        return Outcome(chosen, plan, result, replace(report, plan=plan))
    if apply and converts:
        return Outcome(chosen, plan, result, apply_(model, plan))
    return Outcome(chosen, plan, result)
