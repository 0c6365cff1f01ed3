"""One scheme for each layer: a mixed-integer linear program, solved by HiGHS.

``x[l, c]`` is 1 where layer ``l`` gets candidate ``c``; each layer gets one. Objective and constraints are
sums over the layers: latency and bytes as they are; relative output errors as their squares, so that the
plan's error is their root mean square; nats (see :mod:`ao_autoquant.sensitivity`) as they are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from ao_autoquant.quiet import without_mistakes
from ao_core import AoError, OptionError

Objective = Literal["latency", "bytes", "error"]
FLOAT = "float"
_EXACT_UP_TO = 400  # variables; beyond, a plan within 0.01% of the best is taken
_LIMIT_S = 60.0
_OUT_OF_TIME = 1  # scipy's status
logger = logging.getLogger(__name__)


class InfeasibleError(AoError, ValueError):
    """No plan fits the constraints; the message says which, and what is reachable."""


def checked_objective(text: str) -> Objective:
    """``text`` if it names an objective.

    Raises:
        OptionError: it does not.
    """
    for known in get_args(Objective):
        if text == known:
            found: Objective = known
            return found
    raise OptionError(f"objective is {', '.join(get_args(Objective))}, and {text!r} was given.")


@dataclass(frozen=True)
class Option:
    """One candidate for one layer.

    Attributes:
        us: microseconds a run of the examples takes in this layer, calls and weights counted.
        spread: of ``us``.
        bytes: of the weight.
        error: relative, of the layer's output; or nats that it costs the model, by the measure of the search.
    """

    us: float
    spread: float
    bytes: int
    error: float


@dataclass(frozen=True)
class Budget:
    """What a plan must keep to; None: no limit.

    Attributes:
        max_error: root mean square of the layers' relative output errors; or nats for each row of logits.
        max_bytes: of the whole model.
        max_latency: microseconds of the searched layers for one run of the examples.
        min_speedup: of the searched layers against float.
    """

    max_error: float | None = None
    max_bytes: float | None = None
    max_latency: float | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            wrong = value is not None and not (isinstance(value, (int, float)) and math.isfinite(value))
            if wrong or (value is not None and (value < 0 or (value == 0 and name != "max_error"))):
                raise OptionError(f"{name} must be a positive number or None, and {value!r} was given.")

    def allows(self, sums: Totals, float_us: float) -> bool:
        """Whether a choice that comes to ``sums`` keeps to it; ``float_us``: of the layers in float."""
        speed = None if self.min_speedup is None else float_us / self.min_speedup
        limits = [
            (self.max_error, sums.error),
            (self.max_bytes, sums.bytes),
            (self.max_latency, sums.us),
            (speed, sums.us),
        ]
        return all(most is None or found <= most for most, found in limits)


Options = Mapping[str, Mapping[str, Option]]
"""Layer → candidate → what was measured; each layer has ``"float"``."""


@dataclass(frozen=True)
class Totals:
    """What a choice comes to: see :class:`Budget` for the units."""

    us: float
    bytes: int
    error: float


def totals(
    options: Options, chosen: Mapping[str, str], other_bytes: int = 0, *, additive: bool = False
) -> Totals:
    """Add up ``chosen``: layer → candidate.

    Args:
        options: what was measured.
        chosen: a candidate for each layer.
        other_bytes: outside the searched layers.
        additive: errors are nats, and their sum is the plan's error; else it is their root mean square.
    """
    picked = [options[layer][name] for layer, name in chosen.items()]
    if additive:
        error = math.fsum(each.error for each in picked)
    else:
        squares = math.fsum(each.error**2 for each in picked)
        error = math.sqrt(squares / len(picked)) if picked else 0.0
    return Totals(math.fsum(each.us for each in picked), sum(p.bytes for p in picked) + other_bytes, error)


def cost(options: Options, chosen: Mapping[str, str], objective: Objective) -> float:
    """What ``chosen`` makes of the objective; of latency with the spreads, see :func:`solve`."""
    return math.fsum(_costs(options, layer, name)[objective] for layer, name in chosen.items())


def _costs(options: Options, layer: str, name: str) -> dict[Objective, float]:
    mine, base = options[layer][name], options[layer][FLOAT]
    noise = 0.0 if name == FLOAT else mine.spread + base.spread
    return {"latency": mine.us + noise, "bytes": float(mine.bytes), "error": mine.error}


def groups_of(options: Options, together: Sequence[Sequence[str]]) -> list[list[str]]:
    """Layers that the patterns of a group match, by what they have in common: the parent's name."""
    found: dict[tuple[int, str], list[str]] = {}
    for number, patterns in enumerate(together):
        for name in options:
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                found.setdefault((number, name.rpartition(".")[0]), []).append(name)
    return list(found.values())


def solve(
    options: Options,
    *,
    objective: Objective = "latency",
    budget: Budget | None = None,
    other_bytes: int = 0,
    together: Sequence[Sequence[str]] = (),
    additive: bool = False,
) -> dict[str, str]:
    """The best choice: layer → candidate.

    With the objective latency, a scheme counts its spread and that of float on top of its time: a layer
    changes only where the gain is more than the noise, unless a constraint asks for it.

    Args:
        options: what was measured.
        objective: what to make small.
        budget: constraints.
        other_bytes: bytes of the model outside the searched layers.
        together: groups of layers that get the same candidate.
        additive: how errors add up, see :func:`totals`.

    Raises:
        InfeasibleError: no choice fits the constraints.
        AoError: none was found within a minute.
        OptionError: an unknown objective.
    """
    checked_objective(objective)
    if not options:
        return {}
    problem = _Problem(options, other_bytes, together, additive=additive)
    limits = problem.limits(budget or Budget())
    found = problem.minimize(objective, limits)
    if found is None:
        raise InfeasibleError(_unreachable(problem, budget or Budget(), limits))
    return found


class _Problem:
    def __init__(
        self, options: Options, other_bytes: int, together: Sequence[Sequence[str]], *, additive: bool
    ) -> None:
        self.additive = additive
        self.pairs = [(layer, name) for layer, each in options.items() for name in each]
        self.options, self.other_bytes = options, other_bytes
        flat = [options[layer][name] for layer, name in self.pairs]
        self.costs = {
            "us": np.array([each.us for each in flat]),
            "bytes": np.array([float(each.bytes) for each in flat]),
            "error": np.array([each.error if additive else each.error**2 for each in flat]),
        }
        self.objectives = {
            "latency": np.array([_costs(options, layer, name)["latency"] for layer, name in self.pairs]),
            "bytes": self.costs["bytes"],
            "error": self.costs["error"],
        }
        self.float_us = math.fsum(each[FLOAT].us for each in options.values())
        self.rows = self._one_each() + self._equal(together)

    def limits(self, budget: Budget) -> dict[str, tuple[str, float]]:
        """Constraint → (what it sums, the most it may be)."""
        error = budget.max_error
        if error is not None and not self.additive:
            error = error**2 * len(self.options)
        found = {
            "max_error": ("error", error),
            "max_bytes": ("bytes", None if budget.max_bytes is None else budget.max_bytes - self.other_bytes),
            "max_latency": ("us", budget.max_latency),
            "min_speedup": ("us", None if budget.min_speedup is None else self.float_us / budget.min_speedup),
        }
        return {name: (what, most) for name, (what, most) in found.items() if most is not None}

    def minimize(self, objective: str, limits: Mapping[str, tuple[str, float]]) -> dict[str, str] | None:
        """The choice, or None if there is none.

        Raises:
            AoError: none was found in time.
        """
        cost = self.objectives[objective]
        constraints = list(self.rows)
        for what, most in limits.values():
            scale = max(float(self.costs[what].max()), abs(most), 1e-30)
            constraints.append(LinearConstraint(self.costs[what][None] / scale, -np.inf, most / scale))
        # Ties go to the smaller error, then to float, which is the first of each layer's candidates.
        size = max(float(np.abs(cost).max()), 1e-30)
        nudge = self.costs["error"] / max(float(self.costs["error"].max()), 1e-30) * 1e-9
        exact = len(cost) <= _EXACT_UP_TO
        with without_mistakes():
            found = milp(
                cost / size + nudge,
                integrality=np.ones(len(cost)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0 if exact else 1e-4, "time_limit": _LIMIT_S},
            )
        if found.x is None:
            if found.status == _OUT_OF_TIME:
                raise AoError(
                    f"no plan was found in {_LIMIT_S:g} s for {len(self.options)} layers. Search fewer "
                    "layers or schemes, or loosen the constraints."
                )
            return None
        if found.status == _OUT_OF_TIME:
            logger.warning(
                "the search ended after %g s: its plan may be up to %.2g%% from the best",
                _LIMIT_S,
                100 * found.mip_gap,
            )
        return {layer: name for (layer, name), on in zip(self.pairs, found.x, strict=True) if on > 0.5}

    def least(self, what: str, limits: Mapping[str, tuple[str, float]]) -> float | None:
        """The least sum of ``what`` under ``limits``, in the units of :class:`Totals`."""
        objective = {"us": "latency", "bytes": "bytes", "error": "error"}[what]
        held, self.objectives[objective] = self.objectives[objective], self.costs[what]
        try:
            chosen = self.minimize(objective, limits)
        finally:
            self.objectives[objective] = held
        if chosen is None:
            return None
        found: float = getattr(totals(self.options, chosen, self.other_bytes, additive=self.additive), what)
        return found

    def _one_each(self) -> list[LinearConstraint]:
        layers = {layer: number for number, layer in enumerate(self.options)}
        rows = [layers[layer] for layer, _ in self.pairs]
        shape = (len(layers), len(self.pairs))
        return [LinearConstraint(csr_matrix((np.ones(len(rows)), (rows, range(len(rows)))), shape), 1, 1)]

    def _equal(self, together: Sequence[Sequence[str]]) -> list[LinearConstraint]:
        place = {pair: number for number, pair in enumerate(self.pairs)}
        rows = []
        for group in together:
            first, *others = [layer for layer in group if layer in self.options] or [""]
            for layer in others:
                for name in {**self.options[first], **self.options[layer]}:
                    row = np.zeros(len(self.pairs))
                    for each, sign in ((first, 1.0), (layer, -1.0)):
                        if (each, name) in place:
                            row[place[each, name]] = sign
                    rows.append(row)
        return [LinearConstraint(csr_matrix(np.array(rows)), 0, 0)] if rows else []


def _unreachable(problem: _Problem, budget: Budget, limits: Mapping[str, tuple[str, float]]) -> str:
    """Which constraint can't be met, and the best that can be reached."""
    alone = {name: problem.least(what, {}) for name, (what, _) in limits.items()}
    impossible = []
    for name, (what, most) in limits.items():
        if problem.minimize("latency", {name: (what, most)}) is None:
            impossible.append(_said(problem, budget, name, alone[name]))
    if impossible:
        return "no plan keeps to " + "; nor to ".join(impossible) + ". Loosen it, or install more schemes."
    parts = []
    for name, (what, _) in limits.items():
        rest = {other: limit for other, limit in limits.items() if other != name}
        best = problem.least(what, rest)
        if best is not None:
            parts.append(_said(problem, budget, name, best))
    names = " and ".join(limits)
    return f"no plan keeps to {names} at once. With the others as they are: {'; '.join(parts)}. Loosen one."


def _said(problem: _Problem, budget: Budget, name: str, best: float | None) -> str:
    asked = getattr(budget, name)
    if best is None:
        return f"{name}={asked:g}"
    if name == "min_speedup":
        return f"min_speedup={asked:g} (the most reachable is {problem.float_us / best if best else 0:.4g})"
    return f"{name}={asked:g} (the least reachable is {best:.6g})"
