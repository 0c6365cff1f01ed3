"""``ao bench``: how fast the installed kernels are, beside the float linear."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ao_core.arguments import Device, Dtype, parse_device, parse_dtype, parse_rows, parse_shapes
from ao_core.cli import output, plot
from ao_core.cli.listing import Json
from ao_core.errors import OptionError

if TYPE_CHECKING:
    from ao_core.ops import Op
    from ao_core.speed import Meter

_SHAPES = {"cuda": "14336x4096", "cpu": "1536x576"}
_ROWS = {"cuda": "1,16,128,1024,4096", "cpu": "1,16,256"}


@dataclass(frozen=True)
class Row:
    """One kernel for one problem.

    Attributes:
        op: what it computes.
        provider: whose it is.
        n: columns of the output.
        k: columns of the input.
        rows: of the activations.
        float_us: microseconds of the float linear; None, as all that follows, where it was not timed.
        us: of the kernel.
        ratio: how many times as fast as the float linear it is.
        gb_per_s: bytes that it must read and write, 10**9 a second.
        tflops: operations of the product, 10**12 a second.
        share: of what the device reaches with a large copy or product; see :class:`ao_core.speed.Speed`.
        reason: why it was not timed.
    """

    op: str
    provider: str
    n: int
    k: int
    rows: int
    float_us: float | None = None
    us: float | None = None
    ratio: float | None = None
    gb_per_s: float | None = None
    tflops: float | None = None
    share: float | None = None
    reason: str | None = None


_NUMBERS = ("float_us", "us", "ratio", "gb_per_s", "tflops", "share")


def bench(
    op: Annotated[
        list[str] | None, typer.Option(metavar="OP", help="Only these ops; see 'ao kernels'.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NxK", help="Outputs x inputs of a linear; give several.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="M,M,...", help="Numbers of rows of the activations.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the ratios: .png, .svg or .html.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Time every installed kernel, checked against its op's reference first, beside the float linear."""
    from ao_core.ops import OPS
    from ao_core.progress import track
    from ao_core.speed import Meter

    where, kind = parse_device(device), parse_dtype(dtype)
    entries = {name: entry.item for name, entry in OPS.entries().items()}
    chosen = [OPS.get(name) for name in op] if op else [each for each in entries.values() if each.problem]
    if silent := [each.name for each in chosen if each.problem is None]:
        raise OptionError(f"op {silent[0]} makes no problem of a wanted size, so it can't be measured.")
    sizes = parse_shapes(shape or [_SHAPES.get(where.type, _SHAPES["cpu"])])
    counts = parse_rows(rows or _ROWS.get(where.type, _ROWS["cpu"]))
    if picture is not None:
        plot.check(picture)
    problems = [(each, n, k, m) for each in chosen for n, k in sizes for m in counts]
    assert kind is not None
    meter = Meter(where, kind)
    found: list[Row] = []
    for each, n, k, m in track(problems, "measuring"):
        found += _measured(meter, each, n, k, m)
    if picture is not None:
        plot.draw(found, picture, str(where))
    if json:
        output.as_json([asdict(row) for row in found])
        return
    _show(found)
    if picture is not None:
        output.say(f"drawn in {picture}")


def _measured(meter: Meter, op: Op, n: int, k: int, m: int) -> list[Row]:
    """Every kernel of ``op`` but the reference, fastest first."""
    from ao_core.errors import RejectedError
    from ao_core.kernels import KERNELS
    from ao_core.speed import FaultyError

    rows = []
    for kernel in (e.item for e in KERNELS.entries().values() if e.item.op == op.name):
        row = Row(op.name, kernel.provider, n, k, m)
        try:
            found = meter.kernel(op, kernel, n, k, m)
            rows.append(replace(row, **{name: getattr(found, name) for name in _NUMBERS}))
        except (RejectedError, FaultyError) as error:
            rows.append(replace(row, reason=str(error)))
    return sorted(rows, key=lambda row: row.us if row.us is not None else float("inf"))


def _show(found: list[Row]) -> None:
    """A table for each op, and then why kernels are missing in it."""
    columns = ("kernel", "N×K", "rows", "float µs", "µs", "ratio", "GB/s", "TFLOPS", "ceiling, %")
    for op in dict.fromkeys(row.op for row in found):
        timed = [row for row in found if row.op == op and row.us is not None]
        if timed:
            output.table(op, columns, [_cells(row) for row in timed])
            output.results.print()
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in found:
        if row.reason is not None:
            reasons.setdefault((row.op, row.provider, row.reason), []).append(f"{row.n}×{row.k}, {row.rows}")
    for (op, provider, reason), where in reasons.items():
        places = where[0] if len(where) == 1 else f"{len(where)} problems, the first {where[0]}"
        output.say(f"{op}, {provider}, {places} rows: {reason}")


def _cells(row: Row) -> list[object]:
    return [
        row.provider, f"{row.n}×{row.k}", row.rows, f"{row.float_us:.1f}", f"{row.us:.1f}",
        f"{row.ratio:.2f}", f"{row.gb_per_s:.0f}", f"{row.tflops:.2f}", f"{100 * (row.share or 0):.0f}",
    ]  # fmt: skip
