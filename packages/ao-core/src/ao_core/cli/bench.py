"""``ao bench``: how fast the installed kernels are, beside the float linear."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ao_core.cli import output
from ao_core.cli.listing import Json
from ao_core.cli.modelling import Device, Dtype, parse_device, parse_dtype
from ao_core.errors import ModelError, OptionError

if TYPE_CHECKING:
    import torch

    from ao_core.kernels import Kernel
    from ao_core.ops import Op

_RING_BYTES = {"cuda": 200_000_000, "cpu": 40_000_000}  # of weights in turn: more than the caches hold
_MOST_COPIES = 40
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
        float_us: microseconds of the float linear.
        us: of the kernel; None where ``reason`` says why it was not timed.
        ratio: how many times as fast as the float linear it is.
        gb_per_s: bytes that it must read and write, 10**9 a second.
        tflops: operations of the product, 10**12 a second.
        reason: why it was not timed.
    """

    op: str
    provider: str
    n: int
    k: int
    rows: int
    float_us: float
    us: float | None = None
    ratio: float | None = None
    gb_per_s: float | None = None
    tflops: float | None = None
    reason: str | None = None


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
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the ratios: .png, .svg or .html.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Time every installed kernel, checked against its op's reference first, beside the float linear."""
    from ao_core.ops import OPS
    from ao_core.progress import track

    where, kind = parse_device(device), parse_dtype(dtype)
    entries = {name: entry.item for name, entry in OPS.entries().items()}
    chosen = [OPS.get(name) for name in op] if op else [each for each in entries.values() if each.problem]
    if silent := [each.name for each in chosen if each.problem is None]:
        raise OptionError(f"op {silent[0]} makes no problem of a wanted size, so it can't be measured.")
    sizes = [_size(text) for text in shape or [_SHAPES.get(where.type, _SHAPES["cpu"])]]
    counts = _counts(rows or _ROWS.get(where.type, _ROWS["cpu"]))
    if plot is not None:
        _check_plot(plot)
    problems = [(each, n, k, m) for each in chosen for n, k in sizes for m in counts]
    assert kind is not None
    found: list[Row] = []
    for each, n, k, m in track(problems, "measuring"):
        found += _measured(each, n, k, m, kind, where)
    if plot is not None:
        _draw(found, plot, str(where))
    if json:
        output.as_json([asdict(row) for row in found])
        return
    columns = ("op", "kernel", "N×K", "rows", "float µs", "µs", "ratio", "GB/s", "TFLOPS")
    output.table("", columns, [_cells(row) for row in found if row.us is not None])
    for row in found:
        if row.us is None:
            output.say(f"{row.op}, {row.provider}, {row.n}×{row.k}, {row.rows} rows: {row.reason}")
    if plot is not None:
        output.say(f"drawn in {plot}")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise OptionError(f"--shape takes NxK, such as 14336x4096, and was given {text!r}.")
    return int(match[1]), int(match[2])


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise OptionError(f"--rows takes whole numbers above 0, separated by commas, and was given {text!r}.")
    return [int(part) for part in parts]


def _measured(op: Op, n: int, k: int, m: int, dtype: torch.dtype, device: torch.device) -> list[Row]:
    """Every kernel of ``op`` but the reference, fastest first."""
    import torch
    import torch.nn.functional as F

    from ao_core.kernels import KERNELS
    from ao_core.timing import microseconds

    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    ring_bytes = _RING_BYTES.get(device.type, _RING_BYTES["cpu"])
    size = n * k * dtype.itemsize
    copies = max(2, min(ring_bytes // size, _MOST_COPIES))
    floats = [torch.randn(n, k, device=device, dtype=dtype) for _ in range(copies)]
    base = microseconds([lambda w=w: F.linear(x, w) for w in floats], device)  # type: ignore[misc]
    kernels = [e.item for e in KERNELS.entries().values() if e.item.op == op.name]
    rows = [_row(op, kernel, x, n, base, ring_bytes) for kernel in kernels]
    return sorted(rows, key=lambda row: row.us if row.us is not None else float("inf"))


def _row(op: Op, kernel: Kernel, x: torch.Tensor, n: int, base: float, ring_bytes: int) -> Row:
    import torch

    from ao_core.kernels import key_of
    from ao_core.timing import microseconds

    assert op.problem is not None
    m, k = x.shape
    arguments = op.problem(x, n, 0)
    plain: dict[str, Any] = {
        "op": op.name,
        "provider": kernel.provider,
        "n": n,
        "k": k,
        "rows": m,
        "float_us": base,
    }
    reason = kernel.rejects(key_of(op, arguments)) or _fault(op, kernel, arguments)
    if reason is not None:
        return Row(**plain, reason=reason)
    stored = sum(each.nbytes for each in arguments[1:] if isinstance(each, torch.Tensor))
    ring = [op.problem(x, n, seed) for seed in range(max(2, min(ring_bytes // stored, _MOST_COPIES)))]
    us = microseconds([lambda each=each: kernel.fn(*each) for each in ring], x.device)  # type: ignore[misc]
    moved = stored + x.element_size() * m * (n + k)
    return Row(
        **plain, us=us, ratio=base / us, gb_per_s=moved / us / 1e3, tflops=2 * n * k * m / us / 1e6
    )  # fmt: skip


def _fault(op: Op, kernel: Kernel, arguments: tuple[Any, ...]) -> str | None:
    """Why a kernel's result is not used: it fails, or differs from the reference by more than 2%."""
    try:
        found = kernel.fn(*arguments).double()
    except Exception as error:  # noqa: BLE001 - a stranger's kernel: the table names it
        return f"fails: {type(error).__name__}: {error}"
    expected = op.reference(*arguments).double()
    off = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    return None if off <= 0.02 else f"wrong: off by {off:.2g} of the result"  # NaN is wrong


def _cells(row: Row) -> list[object]:
    return [
        row.op, row.provider, f"{row.n}×{row.k}", row.rows, f"{row.float_us:.1f}", f"{row.us:.1f}",
        f"{row.ratio:.2f}", f"{row.gb_per_s:.0f}", f"{row.tflops:.2f}",
    ]  # fmt: skip


def _check_plot(path: Path) -> None:
    if path.suffix not in (".png", ".svg", ".html"):
        raise OptionError(f"--plot draws .png, .svg or .html, and was given {path}.")
    if not path.resolve().parent.is_dir():
        raise ModelError(f"there is no directory {path.parent} for {path.name}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--plot needs matplotlib: pip install 'ao-core[plot]'.")


def _draw(found: list[Row], path: Path, device: str) -> None:
    """Ratios to the float linear by number of rows: a panel for each shape, a line for each kernel."""
    import io

    from matplotlib.figure import Figure

    timed = [row for row in found if row.us is not None]
    shapes = list(dict.fromkeys((row.n, row.k) for row in timed))
    figure = Figure(figsize=(7, 4 * max(len(shapes), 1)), layout="constrained")
    for index, (n, k) in enumerate(shapes):
        axes = figure.add_subplot(len(shapes), 1, index + 1)
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in timed:
            if (row.n, row.k) == (n, k) and row.ratio is not None:
                lines.setdefault(f"{row.op}, {row.provider}", []).append((row.rows, row.ratio))
        for name, points in sorted(lines.items()):
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="rows", title=f"{n}×{k} on {device}")
        axes.set_ylabel("times as fast as float")
        counts = sorted({row.rows for row in timed})
        axes.set_xticks(counts, [str(each) for each in counts], minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg" if path.suffix == ".html" else path.suffix[1:], dpi=150)
    data = buffer.getvalue()
    if path.suffix == ".html":
        svg = data[data.index(b"<svg") :]
        head = b'<!doctype html><meta charset="utf-8"><title>ao bench</title>'
        data = head + svg
    scratch = path.with_name(path.name + ".part")
    scratch.write_bytes(data)
    scratch.replace(path)
