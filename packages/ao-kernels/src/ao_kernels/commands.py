"""``ao kernels tune``: measure tiles for the shapes of a model."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from ao_kernels.tiles import Cell, Tiles
    from ao_kernels.trials import Trials
    from ao_kernels.tuning import Found


def tune(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A directory, a hub id or a GGUF file.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NxK", help="Outputs x inputs of a linear; give several.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="int4, nf4, int8, float8 or int8-dynamic; by default all.")
    ] = None,
    rows: Annotated[
        str, typer.Option(metavar="M,M,...", help="Numbers of rows; powers of two.")
    ] = "1,2,4,8,16,32,64,128,256,512",
    dtype: Annotated[str, typer.Option(help="Of the activations: bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="To measure on.")] = "cuda",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that compile and run; 0: this one, without a limit.")
    ] = None,
    limit: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="After which tiles that hang are given up.")
    ] = 60,
    again: Annotated[
        bool, typer.Option(help="Measure also what was measured before, and tiles that hung or crashed.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure tiles for the linears of MODEL, or for shapes, and keep the fastest for later calls."""
    from ao_kernels import tiles, trials, tuning

    where = _device(device)
    cells = _cells(model, shape or [], kind or list(tuning.KINDS), rows, dtype)
    known = {} if again else tiles.saved(where)
    open_cells = [cell for cell in cells if cell not in known]
    count = trials.default_workers() if workers is None else workers
    found = []
    with contextlib.ExitStack() as stack:
        tried = stack.enter_context(trials.Children(count, limit)) if count else trials.Here()
        for cell in _tracked(open_cells):
            each = _searched(cell, where, tried, {} if again else tiles.faults(cell.kind, where))
            tiles.save(cell, each.tiles, each.microseconds, where)
            found.append(each)
    _show(found, len(cells) - len(open_cells), json)


def _searched(cell: Cell, device: torch.device, tried: Trials, known: dict[str, str]) -> Found:
    """Also keeps which tiles hang, or crash: they are not tried again."""
    from ao_kernels import tiles, tuning

    ended: dict[Tiles, str] = {}
    try:
        found = tuning.search(cell, device, tried, known)
        ended = found.ended
        return found
    except tuning.NoTilesError as error:
        ended = error.ended
        raise
    finally:
        for each, reason in ended.items():
            tiles.save_fault(cell.kind, each, reason, device)


def _device(text: str) -> torch.device:
    import torch

    from ao_core import OptionError
    from ao_core.triton_support import interpreting

    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise OptionError(f"--device takes cuda or cuda:N, and was given {text!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError("tiles are measured on a GPU, and torch sees none. Install a CUDA build of torch.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {text}: there are {torch.cuda.device_count()} GPUs, counted from 0.")
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        raise OptionError(
            f"tiles are measured on a GPU (or, interpreted, with TRITON_INTERPRET=1), not on {text}."
        )
    return device


def _cells(model: str | None, shapes: list[str], kinds: list[str], rows: str, dtype: str) -> list[Cell]:
    from ao_core import OptionError
    from ao_core.arguments import parse_rows, parse_shapes
    from ao_kernels.tiles import Cell, bucket
    from ao_kernels.tuning import KINDS

    if unknown := sorted(set(kinds) - set(KINDS)):
        raise OptionError(f"--kind takes {', '.join(KINDS)}, and was given {', '.join(unknown)}.")
    if dtype not in ("bfloat16", "float16"):
        raise OptionError(f"--dtype takes bfloat16 or float16, and was given {dtype}.")
    sizes = parse_shapes(shapes)
    if model is not None:
        sizes += _shapes_of(model)
    if not sizes:
        raise OptionError("there is nothing to measure: give a MODEL, or --shape NxK.")
    counts = sorted({bucket(each) for each in parse_rows(rows)})
    return [Cell(kind, n, k, dtype, m) for kind in kinds for n, k in dict.fromkeys(sizes) for m in counts]


def _shapes_of(model: str) -> list[tuple[int, int]]:
    import torch

    from ao_core import load_model

    linears = (each for each in load_model(model).model.modules() if isinstance(each, torch.nn.Linear))
    return [(each.out_features, each.in_features) for each in linears]


def _tracked(cells: list[Cell]) -> Any:
    from rich.console import Console
    from rich.progress import track

    return track(cells, "measuring tiles", console=Console(stderr=True), transient=True)


def _show(found: list[Found], skipped: int, json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from ao_kernels import tiles

    if json:
        import json as writer

        rows = [
            {
                **asdict(each.cell),
                "tiles": repr(each.tiles),
                "microseconds": each.microseconds,
                "before": each.before,
                "excluded": each.excluded,
                "ended": {repr(tiles_): reason for tiles_, reason in each.ended.items()},
            }
            for each in found
        ]
        typer.echo(writer.dumps({"found": rows, "measured_before": skipped, "file": str(tiles.path())}))
        return
    table = Table("kind", "N×K", "rows", "µs", "before", "excluded", box=None)
    for each in found:
        cell = each.cell
        table.add_row(
            cell.kind, f"{cell.n}×{cell.k}", str(cell.rows), f"{each.microseconds:.1f}", f"{each.before:.1f}",
            str(len(each.excluded)),
        )  # fmt: skip
    console = Console()
    if found:
        console.print(table)
    for each in found:
        for ended, reason in each.ended.items():
            console.print(f"given up: {ended!r} for {each.cell.kind}: {reason}", markup=False, soft_wrap=True)
    console.print(f"{len(found)} measured, {skipped} measured before; kept in {tiles.path()}", soft_wrap=True)
