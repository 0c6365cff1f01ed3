"""The whole plan on the model: what it costs and brings, and another one where the sum of parts lied."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ao_autoquant.exchange import exchanged
from ao_autoquant.logits import divergence, next_token_nll, predictions, rows_that_count
from ao_autoquant.profile import evaluating, run
from ao_autoquant.search import FLOAT, Budget, InfeasibleError, Objective, cost, groups_of
from ao_core import Layer, find_layers, parse_scheme

if TYPE_CHECKING:
    from ao_autoquant.exploration import Exploration

ROUNDS = 5
PLAN = "plan"
_ASIDE = 0.97  # of the error that the last plan's measure leads to: two plans are not off by the same factor
_RUNS = 3
_EQUAL = 1e-4  # the solver goes no closer


@dataclass(frozen=True)
class Loss:
    """What changed weights do to a model's predictions on some batches.

    Attributes:
        kl: ``KL(float ‖ changed)``, nats for each row of logits.
        nll: by how much the loss of the next token grows, nats; None where the inputs are no token ids.
        nll_se: standard error of ``nll`` over the batches, paired; None for a single one.
        rows: of logits that were compared.
    """

    kl: float
    nll: float | None
    nll_se: float | None
    rows: int

    @property
    def nats(self) -> float:
        """What ``max_error`` is compared with: ``nll`` where there is one, else ``kl``."""
        return self.kl if self.nll is None else self.nll


@dataclass(frozen=True)
class Checked:
    """A plan on its model.

    Attributes:
        predicted: the plan's error as the sum of its parts, in the search's measure.
        loss: measured.
        float_s: seconds of one run of the examples in float, the best of several.
        plan_s: the same along the plan.
        tried: predicted and measured nats of each plan that the solver gave; the last is the one that stayed.
        uniform: scheme → predicted and measured nats, of the uniform schemes that fit as well.
        kept: ``"plan"``, or the uniform scheme that was better when measured.
    """

    predicted: float
    loss: Loss
    float_s: float
    plan_s: float
    tried: list[tuple[float, float]]
    uniform: dict[str, tuple[float, float]] = field(default_factory=dict)
    kept: str = PLAN


Weights = Sequence[tuple[Layer, torch.Tensor]]


def checked(
    model: nn.Module,
    found: Exploration,
    *,
    objective: Objective,
    budget: Budget,
    together: Sequence[Sequence[str]],
    held: Sequence[Any],
    examples: Sequence[Any],
    counts: Sequence[float],
) -> tuple[dict[str, str], Checked]:
    """The best choice whose measured cost keeps to ``budget.max_error``, and what was measured.

    Where a plan costs more than its parts let expect, the next one is chosen under a limit that is smaller by
    that factor, up to ``ROUNDS`` times. Relative output errors can't be compared with what a model loses:
    with these the first plan is measured, and stays.

    Then the uniform schemes that fit the budget are measured, as far as they could be better: all of them
    with the objective ``"error"``, else those that make the objective no larger. The best one is kept.

    Args:
        model: unchanged afterwards, also where this raises or is interrupted.
        found: what was measured on it.
        objective: see :meth:`~ao_autoquant.Exploration.plan`.
        budget: the same.
        together: the same.
        held: batches whose loss is measured, better others than those of the search.
        examples: what is timed.
        counts: how often each of them runs.

    Raises:
        InfeasibleError: no plan keeps to the limit; says what was reached.
        ModelError: the model's output holds no logits.
    """
    limit = budget.max_error if found.additive else None
    tried: list[tuple[float, float]] = []

    def measure(chosen: Mapping[str, str]) -> Loss:
        with torch.no_grad():
            return measured_loss(model, quantized(model, chosen), held)

    best, failure = None, None
    try:
        best = _planned(found, measure, objective, budget, together, limit, tried)
    except InfeasibleError as error:
        failure = error
    uniform: dict[str, tuple[float, float]] = {}
    for scheme, chosen in _alternatives(found, objective, budget, together, best).items():
        loss = measure(chosen)
        uniform[scheme] = found.totals(chosen).error, loss.nats
        other = _Measured(scheme, chosen, loss, cost(found.options, chosen, objective))
        if (limit is None or loss.nats <= limit) and (best is None or other.better(best, objective)):
            best = other
    if best is None:
        assert failure is not None
        if not uniform:
            raise failure
        said = ", ".join(f"{name} {real:.4g}" for name, (_, real) in uniform.items())
        raise InfeasibleError(
            f"{failure} Uniform schemes that fit otherwise cost, in nats: {said}."
        ) from failure
    with torch.no_grad():
        weights = quantized(model, best.chosen)
    before, after = (seconds(model, each, examples, counts) for each in ([], weights))
    predicted = found.totals(best.chosen).error
    return best.chosen, Checked(predicted, best.loss, before, after, tried, uniform, best.name)


@dataclass(frozen=True)
class _Measured:
    """A choice on the model; ``cost``: what it makes of the objective."""

    name: str
    chosen: dict[str, str]
    loss: Loss
    cost: float

    def better(self, other: _Measured, objective: Objective) -> bool:
        """Whether it is to be preferred; both keep to the limits."""
        if objective != "error" and abs(self.cost - other.cost) > _EQUAL * abs(other.cost):
            return self.cost < other.cost
        return self.loss.nats < other.loss.nats


def _planned(
    found: Exploration,
    measure: Callable[[Mapping[str, str]], Loss],
    objective: Objective,
    budget: Budget,
    together: Sequence[Sequence[str]],
    limit: float | None,
    tried: list[tuple[float, float]],
) -> _Measured:
    """The solver's plan that keeps to ``limit``; what was measured is added to ``tried``."""
    scaled = budget
    for _ in range(ROUNDS):
        try:
            chosen = found.choose(objective, scaled, together)
        except InfeasibleError as error:
            if not tried:
                raise
            raise InfeasibleError(f"{_reached(limit, tried)} Then {error}") from error
        predicted, loss = found.totals(chosen).error, measure(chosen)
        tried.append((predicted, loss.nats))
        if limit is None or loss.nats <= limit:
            return _Measured(PLAN, chosen, loss, cost(found.options, chosen, objective))
        scaled = replace(budget, max_error=min(predicted, limit) * limit / loss.nats * _ASIDE)
    raise InfeasibleError(f"{_reached(limit, tried)} Allow more, or install more schemes.")


def _alternatives(
    found: Exploration,
    objective: Objective,
    budget: Budget,
    together: Sequence[Sequence[str]],
    best: _Measured | None,
) -> dict[str, dict[str, str]]:
    """Uniform schemes that might be better, and fit the budget but for an error in nats: that is measured."""
    base = found.totals(dict.fromkeys(found.options, FLOAT)).us
    kept = budget if not found.additive else replace(budget, max_error=None)
    groups = groups_of(found.options, together)
    return {
        scheme: chosen
        for scheme, chosen in found.uniform().items()
        if kept.allows(found.totals(chosen), base)
        and all(len({chosen[layer] for layer in group}) == 1 for group in groups)
        and (best is None or chosen != best.chosen)
        and (best is None or objective == "error" or _no_larger(found, chosen, objective, best))
    }


def _no_larger(found: Exploration, chosen: Mapping[str, str], objective: Objective, best: _Measured) -> bool:
    return cost(found.options, chosen, objective) <= best.cost * (1 + _EQUAL)


def quantized(model: nn.Module, chosen: Mapping[str, str]) -> Weights:
    """The weights of a choice, beside those of the model."""
    layers = find_layers(model).replaceable
    return [
        (layers[name], layers[name].quantize(parse_scheme(text)))
        for name, text in chosen.items()
        if text != FLOAT
    ]


def measured_loss(model: nn.Module, weights: Weights, held: Sequence[Any]) -> Loss:
    """Compare the model's predictions with those that it makes with ``weights``; it is left as it was."""
    kl, rows = 0.0, 0
    losses: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
    for batch in held:
        own = predictions(model, batch)
        with exchanged(weights):
            other = predictions(model, batch)
        one, two = (rows_that_count(batch, each) for each in (own, other))
        kl, rows = kl + divergence(one, two), rows + len(one)
        losses.append((next_token_nll(batch, own), next_token_nll(batch, other)))
    nll, se = growth(*zip(*losses, strict=True))
    return Loss(kl / rows, nll, se, rows)


def token_losses(model: nn.Module, held: Sequence[Any]) -> list[torch.Tensor | None]:
    """The loss of each next token of each batch; None where a batch holds no token ids."""
    return [next_token_nll(batch, predictions(model, batch)) for batch in held]


def growth(
    before: Sequence[torch.Tensor | None], after: Sequence[torch.Tensor | None]
) -> tuple[float | None, float | None]:
    """By how much the mean loss of a token grew, and its standard error over batches, paired."""
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None and len(b)]
    worse, counts = [float((a - b).double().sum()) for b, a in pairs], [len(b) for b, _ in pairs]
    total, n = sum(counts), len(counts)
    if not total:
        return None, None
    mean = math.fsum(worse) / total
    squares = math.fsum((w - mean * count) ** 2 for w, count in zip(worse, counts, strict=True))
    return mean, math.sqrt(squares * n / (n - 1)) / total if n > 1 else None


def seconds(model: nn.Module, weights: Weights, examples: Sequence[Any], counts: Sequence[float]) -> float:
    """Of one run of the examples with ``weights``: for each the best of several, times how often it runs."""
    with exchanged(weights), evaluating(model), torch.no_grad():
        return math.fsum(
            count * _best(lambda batch=batch: run(model, batch))  # type: ignore[misc]
            for batch, count in zip(examples, counts, strict=True)
        )


def _best(call: Callable[[], object]) -> float:
    found = []
    for _ in range(_RUNS + 1):  # the first one compiles and warms up
        start = _now()
        call()
        found.append(_now() - start)
    return min(found[1:])


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _reached(limit: float | None, tried: Sequence[tuple[float, float]]) -> str:
    said = ", ".join(f"{real:.4g} (its parts: {sum_:.4g})" for sum_, real in tried)
    best = min(real for _, real in tried)
    return (
        f"no plan was found that keeps to max_error={limit:g} when measured on the whole model: "
        f"{len(tried)} were tried, and cost {said} nats. The least reached is {best:.4g}."
    )
