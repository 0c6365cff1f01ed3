"""The command line ``ao``. Importing it imports no torch: commands do that when they run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ao_core import plugins
from ao_core.cli import bench, compress, listing, modelling, output
from ao_core.command import Command
from ao_core.errors import AoError, PlanWarning

BUILT_IN: dict[str, Callable[..., Any]] = {
    "plugins": listing.list_plugins,
    "schemes": listing.list_schemes,
    "kernels": listing.list_kernels,
    "quantize": modelling.quantize,
    "compress": compress.compress,
    "eval": modelling.evaluate,
    "bench": bench.bench,
}


def build() -> typer.Typer:
    """The whole command line: ao's own commands, and those of every plugin."""
    app = typer.Typer(
        name="ao",
        help="Make PyTorch models smaller and faster: quantize, measure, compare.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    kernels = typer.Typer()  # a group of its own: plugins add to it
    for name, function in BUILT_IN.items():
        if name == "kernels":
            kernels.callback(invoke_without_command=True)(function)
            app.add_typer(kernels, name=name)
        else:
            app.command(name)(function)
    for command, source in plugins.commands():
        alone = typer.Typer()
        _add(alone, command)
        try:
            typer.main.get_command(alone)
        except Exception as error:  # noqa: BLE001 - typer refuses an annotation in many ways
            output.warn(f"command {command.name!r} of {source} is left out: typer refuses it: {error}")
        else:
            _add(kernels if command.name.startswith("kernels ") else app, command)
    return app


def _add(app: typer.Typer, command: Command) -> None:
    name = command.name.rpartition(" ")[2]
    if isinstance(command.run, typer.Typer):
        app.add_typer(command.run, name=name)
    else:
        app.command(name)(command.run)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage."""
    warnings.showwarning = _show_warning
    try:
        build()(args=arguments, prog_name="ao", standalone_mode=True)
    except AoError as error:
        output.fail(str(error))
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        from ao_core import __version__

        typer.echo(f"ao {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    # RuntimeWarning: of a file that keeps what was measured
    if issubclass(category, (plugins.PluginWarning, PlanWarning, RuntimeWarning)):
        output.warn(str(message))
