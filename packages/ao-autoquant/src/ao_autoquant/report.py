"""What a search found: a table on the terminal, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ao_autoquant.check import PLAN
from ao_autoquant.pareto import pareto
from ao_autoquant.search import FLOAT, Budget, Totals

if TYPE_CHECKING:
    from ao_autoquant.exploration import Exploration
    from ao_core import Plan

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1300px; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: 13px }
th, td { padding: 3px 10px; text-align: left; border-bottom: 1px solid #e4e4e4 }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr.chosen td { font-weight: 600; background: #eef6ee }
div.wide { overflow-x: auto } svg { max-width: 100%; height: auto }
p { max-width: 75em } p.note { color: #555 }
div.heat { overflow: auto; max-height: 90vh }
div.heat table { border-collapse: separate; border-spacing: 0 }
div.heat th { position: sticky; top: 0; background: #fff; z-index: 1; vertical-align: bottom }
div.heat th.number { white-space: normal; max-width: 7.5em; padding: 3px 6px }
div.heat td:first-child, div.heat th:first-child { position: sticky; left: 0; background: #fff }
div.heat th:first-child { z-index: 2 }
td.cell { text-align: right; font-variant-numeric: tabular-nums; padding: 3px 6px }
td.best { outline: 2px solid #1a1a1a; outline-offset: -2px }
span.key { padding: 1px 8px; margin-right: 3px; border: 1px solid #ccc } small { font-size: 11px }
"""
_UNITS = (
    "<p class=note>µs of the searched layers for one run of the examples; MB of the whole model; error: "
    "{}.</p>"
)
_ERRORS = {
    "output": "root mean square of the layers' relative output errors",
    "loss": "nats that predictions move for a row of logits, from gradients, the sum over layers",
    "kl": "nats that predictions move for a row of logits, of one changed layer, the sum over layers",
}


def summary(found: Exploration, chosen: Mapping[str, str], plan: Plan | None = None) -> dict[str, Any]:
    """The totals of the plan, of float and of each uniform scheme, counts, faults: JSON-able."""
    return {
        "error_measure": found.measure,
        "evidence": {} if plan is None else dict(plan.evidence),
        "rounded": {} if plan is None else rounded(plan),
        "plan": asdict(found.totals(chosen)),
        "schemes": dict(Counter(chosen.values())),
        "uniform": {name: asdict(found.totals(each)) for name, each in found.uniform().items()},
        "layers": dict(chosen),
        "left": found.left,
        "faults": [asdict(fault) for fault in found.faults],
        "proposals": found.proposals,
        "fingerprint": found.fingerprint,
        "measured": found.measured,
        "reused": found.reused,
    }


def rounded(plan: Plan) -> dict[str, str]:
    """Layers that an algorithm that was asked for did not take → why."""
    return {
        name: choice.evidence["refine"] for name, choice in plan.layers.items() if "refine" in choice.evidence
    }


def findings(plan: Plan | None) -> list[str]:
    """Sentences on what was measured of the whole plan, and on what was not refined."""
    if plan is None:
        return []
    said = []
    if check := plan.evidence.get("check"):
        loss = check["loss"]
        nll = "" if loss["nll"] is None else f", {loss['nll']:+.4f} nats of the next token's loss"
        if loss["nll_se"] is not None:
            nll += f" (± {loss['nll_se']:.4f})"
        nats = plan.evidence["error_measure"] != "output"
        predicted = f"; its parts sum up to {check['predicted']:.4f} nats" if nats else ""
        said.append(
            f"on the whole model the plan costs {loss['kl']:.4f} nats of KL{nll}{predicted}; a run takes "
            f"{_time(check['plan_s'])}, and {_time(check['float_s'])} in float"
        )
        if len(tried := check["tried"]) > 1 and check["kept"] == PLAN:
            costs = ", ".join(f"{real:.4g} (parts {parts:.4g})" for parts, real in tried)
            said.append(f"{len(tried)} plans were tried until one kept to max_error; they cost {costs} nats")
        said += _beside(check)
    if (refined := plan.evidence.get("refined")) and refined["nll"] is not None:
        said.append(f"refined, it costs {refined['nll']:+.4f} nats of the next token's loss")
    reasons = Counter(rounded(plan).values())
    return said + [f"{count} layers were not refined, but {why}" for why, count in reasons.items()]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _beside(check: Mapping[str, Any]) -> list[str]:
    """What came of the uniform schemes that fit as well."""
    costs = ", ".join(f"{name} {real:.4g}" for name, (_, real) in check["uniform"].items())
    if check["kept"] == PLAN:
        said = "uniform schemes that fit as well were measured, and are no better"
        return [f"{said}: {costs} nats"] if costs else []
    tried = ", ".join(f"{real:.4g} (parts {parts:.4g})" for parts, real in check["tried"])
    why = f"it is better than what the parts let choose, which costs {tried}" if tried else "it fits"
    none = "" if tried else "by the sum of its parts no plan fits; "
    said = f"{none}{check['kept']} on all layers was kept: measured on the whole model {why}"
    return [f"{said}; uniform schemes cost {costs} nats"]


def show(found: Exploration, chosen: Mapping[str, str], plan: Plan | None = None) -> None:
    """Print the table of totals, what the plan uses, and what went wrong."""
    from rich.console import Console
    from rich.markup import escape as plain
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("", "layers", "µs", "speed-up", "MB", "error", box=None, pad_edge=False)
    for name, cells in _totals(found, chosen):
        table.add_row(plain(name), *cells)
    console.print(table)
    if set(chosen.values()) == {FLOAT}:
        console.print("float wins: no scheme that fits the constraints is better by more than the spread")
    for line in findings(plan):
        console.print(plain(line), soft_wrap=True)
    for fault in found.faults:
        line = f"fault: {fault.scheme} ({fault.distribution}) on {fault.layer}: {fault.error}"
        console.print(plain(line), soft_wrap=True)
    for plugin, reason in found.proposals.items():
        console.print(plain(f"fault: plugin {plugin}: {reason}"), soft_wrap=True)
    console.print(
        f"{len(chosen)} layers searched, {len(found.left)} left alone; "
        f"{found.measured} numbers measured, {found.reused} reused (from equal layers, or known before)",
        soft_wrap=True,
    )


def html(
    found: Exploration,
    chosen: Mapping[str, str],
    *,
    title: str,
    objective: str,
    budget: Budget,
    plan: Plan | None = None,
) -> str:
    """One page: totals, the plot of time against error, layers by schemes, reasons, faults, environment."""
    limits = ", ".join(f"{key}={value:g}" for key, value in vars(budget).items() if value is not None)
    asked = f"Least {objective}" + (f", with {limits}" if limits else "")
    rows = [(name, *cells) for name, cells in _totals(found, chosen)]
    used = Counter(chosen.values())
    verdict = ", ".join(f"{name} on {count}" for name, count in used.most_common())
    if set(used) == {FLOAT}:
        verdict = "float on all: no scheme is faster by more than the spread, or fits the constraints"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(asked)}. Chosen: {escape(verdict)}.</p>",
        "<h2>Totals</h2>",
        _table(("", "layers", "µs", "speed-up", "MB", _unit(found)), rows, chosen_first=True, numbers=5),
        _UNITS.format(_ERRORS[found.measure]),
        *(f"<p>{escape(line[0].upper() + line[1:])}.</p>" for line in findings(plan)),
        f"<h2>Time against error</h2>{pareto(found, chosen)}",
        f"<h2>Layers by schemes</h2>{_heat(found, chosen)}",
        f"<h2>Layers that stay float</h2>{_float_reasons(chosen, plan)}",
        "<h2>Layers left alone</h2>",
        _table(("layer", "why"), list(found.left.items())) if found.left else "<p>None.</p>",
        "<h2>Schemes that do not fit a layer</h2>",
        _table(("scheme", "why", "layers"), _rejections(found), numbers=1)
        if any(found.rejected.values())
        else "<p>None.</p>",
        "<h2>Faults</h2>",
        _table(("scheme", "from", "layer", "what happened"), _faults(found))
        if _faults(found)
        else "<p>None.</p>",
        "<h2>Environment</h2>",
        _table(("", ""), [(k, v) for k, v in found.fingerprint.items() if v]),
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
    return f"{head}<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"


def write(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _totals(found: Exploration, chosen: Mapping[str, str]) -> Iterable[tuple[str, list[str]]]:
    uniform = found.uniform()
    base = found.totals(uniform[FLOAT])

    def cells(each: Mapping[str, str], sums: Totals) -> list[str]:
        count = sum(name != FLOAT for name in each.values())
        speed = base.us / sums.us if sums.us else 1.0
        time = f"{sums.us:.1f}" if sums.us < 1e4 else f"{sums.us:,.0f}"
        return [str(count), time, f"{speed:.2f}", f"{sums.bytes / 1e6:.1f}", f"{sums.error:.4f}"]

    yield "plan", cells(chosen, found.totals(chosen))
    for name, each in sorted(uniform.items(), key=lambda item: found.totals(item[1]).us):
        yield name, cells(each, found.totals(each))


def _heat(found: Exploration, chosen: Mapping[str, str]) -> str:
    """A row for each layer, a column for each scheme: times as fast as float, coloured; the error below."""
    names = [FLOAT, *sorted({name for each in found.options.values() for name in each} - {FLOAT})]
    lines = ["<th>layer</th>" + "".join(f"<th class=number>{_breakable(name)}</th>" for name in names)]
    for layer, options in found.options.items():
        cells = [f"<td>{escape(layer)}</td>"]
        for name in names:
            option = options.get(name)
            if option is None:
                reason = found.rejected.get(layer, {}).get(name, "a fault, see below")
                cells.append(f'<td class=cell title="{escape(reason)}">–</td>')
                continue
            ratio = options[FLOAT].us / option.us if option.us else 1.0
            tip = f"{option.us:.1f} ± {option.spread:.1f} µs, error {option.error:.3g}, {option.bytes} bytes"
            best = " best" if chosen[layer] == name else ""
            cells.append(
                f'<td class="cell{best}" style="background:{_colour(ratio)}" title="{tip}">{ratio:.2f}'
                f"<br><small>{option.error:.2g}</small></td>"
            )
        lines.append("".join(cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    keys = "".join(
        f'<span class=key style="background:{_colour(ratio)}">{ratio:g}×</span>'
        for ratio in (0.25, 0.5, 1, 2, 4)
    )
    unit = "nats for a row of logits" if found.additive else "relative to the layer's output"
    note = (
        f"<p class=note>Upper number: times as fast as float, {keys}. Lower number: the error, {unit}. The "
        "framed scheme is chosen. –: it does not fit, or failed. Hover for µs and bytes.</p>"
    )
    return f"{note}<div class=heat><table>{body}</table></div>"


def _breakable(name: str) -> str:
    """A scheme's text that may be broken after its marks."""
    return re.sub(r"([:,_=])", r"\1<wbr>", escape(name))


def _float_reasons(chosen: Mapping[str, str], plan: Plan | None) -> str:
    """Why searched layers stay float."""
    rows = [
        (layer, plan.layers[layer].reason or "")
        for layer, name in chosen.items()
        if name == FLOAT and plan is not None and layer in plan.layers
    ]
    return _table(("layer", "why"), rows) if rows else "<p>None.</p>"


def _colour(ratio: float) -> str:
    """Green where faster than float, red where slower."""
    strength = min(abs(math.log2(max(ratio, 1e-6))) / 2, 1.0) * 0.55
    return f"rgba({'46,139,87' if ratio >= 1 else '192,57,43'},{strength:.2f})"


def _rejections(found: Exploration) -> list[tuple[str, str, str]]:
    """A row for each scheme and reason; reasons that differ in their numbers only are one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for each in found.rejected.values():
        for name, why in each.items():
            groups.setdefault((name, re.sub(r"\d+", "#", why)), []).append(why)
    return [(name, reasons[0], str(len(reasons))) for (name, _), reasons in sorted(groups.items())]


def _faults(found: Exploration) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [(f.scheme, f.distribution, f.layer, f.error) for f in found.faults]
    return rows + [("", plugin, "", reason) for plugin, reason in found.proposals.items()]


def _unit(found: Exploration) -> str:
    return "error (nats)" if found.additive else "error (relative)"


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, chosen_first: bool = False, numbers: int = 0
) -> str:
    """Rows below ``columns``, of which the last ``numbers`` hold numbers."""
    kinds = [""] * (len(columns) - numbers) + [" class=number"] * numbers
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, columns, strict=True))
    body = ""
    for number, row in enumerate(rows):
        mark = " class=chosen" if chosen_first and number == 0 else ""
        cells = zip(kinds, row, strict=True)
        body += f"<tr{mark}>" + "".join(f"<td{k}>{escape(str(cell))}</td>" for k, cell in cells) + "</tr>"
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"
