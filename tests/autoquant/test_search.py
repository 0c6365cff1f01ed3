"""The program against every choice there is."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ao_autoquant import search
from ao_autoquant.quiet import without_mistakes
from ao_autoquant.search import FLOAT, Budget, InfeasibleError, Option, solve, totals
from ao_core import AoError, OptionError

NAMES = ("float", "a", "b", "c")


def problem(seed, layers=5):
    rng = random.Random(seed)

    def option(name):
        error = 0.0 if name == FLOAT else rng.random()
        return Option(rng.uniform(10, 100), rng.uniform(0, 5), rng.randint(100, 1000), error)

    return {f"l{i}": {name: option(name) for name in NAMES} for i in range(layers)}


def cost(options, chosen, objective):
    picked = [(options[layer][name], name, options[layer][FLOAT]) for layer, name in chosen.items()]
    if objective == "latency":
        return sum(o.us + (0 if name == FLOAT else o.spread + base.spread) for o, name, base in picked)
    if objective == "bytes":
        return sum(o.bytes for o, _, _ in picked)
    return sum(o.error**2 for o, _, _ in picked)


def keeps(options, chosen, budget, other):
    found = totals(options, chosen, other)
    base = sum(each[FLOAT].us for each in options.values())
    return (
        (budget.max_error is None or found.error <= budget.max_error)
        and (budget.max_bytes is None or found.bytes <= budget.max_bytes)
        and (budget.max_latency is None or found.us <= budget.max_latency)
        and (budget.min_speedup is None or base / found.us >= budget.min_speedup)
    )


BUDGETS = [
    Budget(),
    Budget(max_error=0.3),
    Budget(max_bytes=3000),
    Budget(max_error=0.4, max_bytes=3200),
    Budget(min_speedup=1.3),
    Budget(max_latency=250, max_error=0.5),
]


@pytest.mark.parametrize("objective", ["latency", "bytes", "error"])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_best_of_all_choices(seed, budget, objective):
    options = problem(seed)
    every = [
        dict(zip(options, names, strict=True)) for names in itertools.product(NAMES, repeat=len(options))
    ]
    fit = [chosen for chosen in every if keeps(options, chosen, budget, 500)]
    if not fit:
        with pytest.raises(InfeasibleError):
            solve(options, objective=objective, budget=budget, other_bytes=500)
        return
    best = min(cost(options, chosen, objective) for chosen in fit)
    found = solve(options, objective=objective, budget=budget, other_bytes=500)
    assert keeps(options, found, budget, 500)
    assert cost(options, found, objective) == pytest.approx(best, rel=1e-6, abs=1e-6)


def test_a_gain_within_the_spread_changes_nothing():
    options = {"l": {FLOAT: Option(100, 4, 10, 0), "a": Option(93, 4, 5, 0.1)}}
    assert solve(options) == {"l": FLOAT}
    options["l"]["a"] = Option(91, 4, 5, 0.1)
    assert solve(options) == {"l": "a"}


def test_layers_together_get_one_scheme():
    options = {
        "q": {FLOAT: Option(10, 0, 1, 0), "a": Option(1, 0, 1, 0), "b": Option(5, 0, 1, 0)},
        "k": {FLOAT: Option(10, 0, 1, 0), "a": Option(20, 0, 1, 0), "b": Option(6, 0, 1, 0)},
        "o": {FLOAT: Option(10, 0, 1, 0), "a": Option(1, 0, 1, 0)},
    }
    assert solve(options) == {"q": "a", "k": "b", "o": "a"}
    assert solve(options, together=[["q", "k"]]) == {"q": "b", "k": "b", "o": "a"}
    del options["k"]["b"], options["q"]["a"]
    assert solve(options, together=[["q", "k"]]) == {"q": FLOAT, "k": FLOAT, "o": "a"}


def test_the_error_of_a_plan_is_the_root_mean_square():
    options = {"x": {"a": Option(1, 0, 1, 0.3)}, "y": {"a": Option(1, 0, 1, 0.4)}}
    assert totals(options, {"x": "a", "y": "a"}).error == pytest.approx(math.sqrt((0.09 + 0.16) / 2))


def test_an_impossible_constraint_says_what_is_reachable():
    options = problem(0)
    least = sum(min(each.bytes for each in layer.values()) for layer in options.values()) + 7
    with pytest.raises(InfeasibleError, match=rf"max_bytes=10 \(the least reachable is {least}\)"):
        solve(options, budget=Budget(max_bytes=10, max_error=1.0), other_bytes=7)
    base = sum(layer[FLOAT].us for layer in options.values())
    most = base / sum(min(each.us for each in layer.values()) for layer in options.values())
    with pytest.raises(InfeasibleError, match=rf"min_speedup=99 \(the most reachable is {most:.4g}\)"):
        solve(options, budget=Budget(min_speedup=99))


def test_two_constraints_that_exclude_each_other_are_both_named():
    options = {"l": {FLOAT: Option(1, 0, 1000, 0), "a": Option(1, 0, 100, 0.5)}}
    with pytest.raises(InfeasibleError, match="at once") as caught:
        solve(options, budget=Budget(max_error=0.1, max_bytes=500))
    assert "max_error=0.1 (the least reachable is 0.5)" in str(caught.value)
    assert "max_bytes=500 (the least reachable is 1000)" in str(caught.value)


@pytest.mark.parametrize(
    "bad", [{"max_error": -1}, {"max_bytes": 0}, {"min_speedup": math.nan}, {"max_latency": "5"}]
)
def test_a_budget_that_is_no_number_is_refused(bad):
    with pytest.raises(OptionError, match=next(iter(bad))):
        Budget(**bad)


def test_an_unknown_objective_is_refused():
    with pytest.raises(OptionError, match="'speed' was given"):
        solve(problem(0), objective="speed")


def test_a_search_that_runs_out_of_time_says_so(monkeypatch, caplog):
    options = {"a": {FLOAT: Option(2.0, 0.0, 8, 0.0), "s": Option(1.0, 0.0, 4, 0.1)}}
    monkeypatch.setattr(search, "milp", lambda *_, **__: SimpleNamespace(x=None, status=1))
    with pytest.raises(AoError, match="no plan was found in 60 s for 1 layers") as caught:
        solve(options)
    assert not isinstance(caught.value, InfeasibleError)
    ended = SimpleNamespace(x=np.array([0.0, 1.0]), status=1, mip_gap=0.02)
    monkeypatch.setattr(search, "milp", lambda *_, **__: ended)
    assert solve(options) == {"a": "s"}
    assert "may be up to 2% from the best" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="the C library's standard output is redirected on POSIX only")
def test_what_the_solver_prints_by_mistake_is_dropped_and_nothing_else(capfd):
    libc = ctypes.CDLL(None)

    def prints():
        with without_mistakes():
            sys.stdout.write("from Python\n")
            libc.printf(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n")
            libc.printf(b"from C\n")
            raise KeyError

    with pytest.raises(KeyError):
        prints()
    sys.stdout.write("after\n")
    said = capfd.readouterr().out.splitlines()
    assert sorted(said[:2]) == ["from C", "from Python"] and said[2:] == ["after"]
