"""``ao plugins``, ``ao schemes``, ``ao kernels``: what is installed, and what is not usable and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ao_core.cli import output

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_plugins(json: Json = False) -> None:
    """Show installed plugins: what each provides, or why it is not usable."""
    from ao_core import plugins

    rows = [_plugin_row(plugin) for plugin in plugins.installed()]
    if json:
        output.as_json(rows)
        return
    columns = ("plugin", "distribution", "state", "provides")
    output.table("", columns, [[row[column] for column in columns] for row in rows])
    for row in rows:
        for problem in row["problems"]:
            output.results.print()
            text = f"{row['plugin']}, {problem['stage']}: {problem['error']}. {problem['hint']}."
            output.results.print(text, markup=False, soft_wrap=True)


def list_schemes(json: Json = False) -> None:
    """Show installed schemes with their options and defaults."""
    import dataclasses

    from ao_core.scheme import SCHEMES

    rows: list[dict[str, Any]] = [
        {
            "scheme": name,
            "options": dataclasses.asdict(entry.item()),
            "version": entry.item.version,
            "plugin": entry.source.plugin,
            "distribution": f"{entry.source.distribution} {entry.source.version}",
            "summary": entry.item.summary,
        }
        for name, entry in SCHEMES.entries().items()
    ]
    if json:
        output.as_json(rows)
        return
    output.table(
        "",
        ("scheme", "options", "plugin", "what it is"),
        [[r["scheme"], _options(r["options"]), r["plugin"], r["summary"]] for r in rows],
    )
    _report_faults()


def list_kernels(
    context: typer.Context,
    explain: Annotated[
        str | None,
        typer.Option(metavar="OP", help="For one op: each kernel, its reason, the choice."),
    ] = None,
    device: Annotated[str, typer.Option(help="Device to explain the choice for.")] = "cpu",
    json: Json = False,
) -> None:
    """Show ops and their kernels; with --explain, which one runs and why the others do not."""
    if context.invoked_subcommand is not None:
        return
    from ao_core.kernels import KERNELS
    from ao_core.ops import OPS

    if explain is not None:
        _explain(explain, device, json)
        return
    rows: list[dict[str, Any]] = [
        {
            "op": name,
            "kernels": [
                {
                    "provider": k.item.provider,
                    "priority": k.item.priority,
                    "plugin": k.source.plugin,
                }
                for k in KERNELS.entries().values()
                if k.item.op == name
            ],
            "plugin": entry.source.plugin,
        }
        for name, entry in OPS.entries().items()
    ]
    if json:
        output.as_json(rows)
        return
    output.table(
        "",
        ("op", "plugin", "kernels"),
        [[r["op"], r["plugin"], _providers(r["kernels"])] for r in rows],
    )
    _report_faults()


def _explain(name: str, device: str, json: bool) -> None:
    from dataclasses import asdict

    from ao_core.arguments import parse_device
    from ao_core.kernels import explain
    from ao_core.ops import OPS

    rows = explain(OPS.get(name), parse_device(device))
    if json:
        output.as_json([asdict(row) for row in rows])
        return
    for key in dict.fromkeys(row.key for row in rows):
        output.table(
            key,
            ("", "kernel", "priority", "rejects"),
            [
                ["->" if row.chosen else "", row.provider, row.priority, row.reason]
                for row in rows
                if row.key == key
            ],
        )
        output.results.print()


def _plugin_row(plugin: Any) -> dict[str, Any]:
    problems = [*plugin.notes, *([plugin.fault] if plugin.fault else [])]
    state = "not usable" if plugin.fault else "in part" if problems else "ok"
    counts = {kind: plugin.names(kind) for kind in ("scheme", "op", "kernel", "algorithm", "command")}
    provides = ", ".join(
        f"{len(names)} {kind}{'s' * (len(names) > 1)}" for kind, names in counts.items() if names
    )
    return {
        "plugin": plugin.source.plugin,
        "distribution": f"{plugin.source.distribution} {plugin.source.version}",
        "state": "disabled" if plugin.disabled else state,
        "provides": provides,
        "names": {f"{kind}s": names for kind, names in counts.items() if names},
        "problems": [{"stage": f.stage, "error": f.error, "hint": f.hint} for f in problems],
    }


def _report_faults() -> None:
    from ao_core.registry import FAULTS

    if FAULTS:
        output.warn(f"{len(FAULTS)} plugins have problems; 'ao plugins' shows them")


def _options(options: dict[str, Any]) -> str:
    return "\n".join(f"{name}={default}" for name, default in options.items())


def _providers(kernels: list[dict[str, Any]]) -> str:
    return ", ".join([*(f"{k['provider']} ({k['plugin']})" for k in kernels), "reference"])
