"""The picture of ``ao bench --plot``."""

from __future__ import annotations

import importlib.util
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ao_core.errors import ModelError, OptionError


def check(path: Path) -> None:
    """That :func:`draw` can write ``path``, before anything is measured.

    Raises:
        OptionError: another kind of file, or matplotlib is missing.
        ModelError: there is no such directory, or it is not writable.
    """
    if path.suffix not in (".png", ".svg", ".html"):
        raise OptionError(f"--plot draws .png, .svg or .html, and was given {path}.")
    if not path.resolve().parent.is_dir():
        raise ModelError(f"there is no directory {path.parent} for {path.name}.")
    try:
        tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        raise ModelError(
            f"can't draw {path}: {path.parent} is not writable ({error.strerror}). Give another place."
        ) from error
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--plot needs matplotlib: pip install 'ao-core[plot]'.")


def draw(found: Sequence[Any], path: Path, device: str) -> None:
    """Ratios to the float linear by number of rows: a panel for each op and shape, a line for each kernel."""
    from matplotlib.figure import Figure

    timed = [row for row in found if row.us is not None]
    shapes = list(dict.fromkeys((row.n, row.k) for row in timed))
    ops = list(dict.fromkeys(row.op for row in timed))
    across, down = max(len(shapes), 1), max(len(ops), 1)
    figure = Figure(figsize=(1 + 4 * across, 1 + 2.4 * down), layout="constrained")
    figure.suptitle(f"times as fast as the float linear, {device}")
    for index, (op, (n, k)) in enumerate((op, shape) for op in ops for shape in shapes):
        axes = figure.add_subplot(down, across, index + 1)
        _panel(axes, [row for row in timed if (row.op, row.n, row.k) == (op, n, k)])
        axes.set_title(f"{op}, {n}×{k}", fontsize=9)
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


def _panel(axes: Any, rows: Sequence[Any]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        lines.setdefault(row.provider, []).append((row.rows, row.ratio))
    for name, points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("rows", fontsize=8)
    counts = sorted({row.rows for row in rows})
    axes.set_xticks(counts, [str(each) for each in counts], minor=False)
    axes.set_xticks([], minor=True)
    for which in ("major", "minor"):
        getattr(axes.yaxis, f"set_{which}_formatter")("{x:g}")
    axes.tick_params(labelsize=7, which="both")
    axes.legend(fontsize=7)
