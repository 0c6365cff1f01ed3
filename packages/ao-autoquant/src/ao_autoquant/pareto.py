"""The plot of time against error: every uniform scheme and the plan, as inline SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

    from ao_autoquant.exploration import Exploration

_UNIFORM = "one scheme on all layers"
_MILLISECONDS = 1e5  # µs, from which the axis counts in ms
_WIDE = 4.0  # times between the fastest and the slowest, from which the axis is logarithmic
_MARKER = 7.0  # points from a marker's centre that a label keeps away
_STEPS = (0, 11, -11, 22, -22, 33, -33, 44, -44, 55, -55, 66, -66, 77, -77, 88, -88)  # points up or down


def pareto(found: Exploration, chosen: Mapping[str, str]) -> str:
    """The plot; lower is faster, further left is closer to float."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.add_subplot()
    canvas: Any = FigureCanvasAgg(figure)
    sums = {name: found.totals(each) for name, each in found.uniform().items()}
    most = max(each.us for each in sums.values())
    scale, unit = (1e-3, "ms") if most >= _MILLISECONDS else (1.0, "µs")
    points = {name: (each.error, each.us * scale) for name, each in sums.items()}
    total = found.totals(chosen)
    mine = total.error, total.us * scale
    axes.plot(*zip(*points.values(), strict=True), "o", color="#5b6f8a", markersize=7, label=_UNIFORM)
    axes.plot(*([each] for each in mine), "*", color="#c0392b", markersize=17, label="the plan")
    error = "nats for a row of logits" if found.additive else "relative, root mean square over layers"
    axes.set_xlabel(f"error ({error}); further left is closer to float", fontsize=11)
    axes.set_ylabel(f"time of the searched layers ({unit}); lower is faster", fontsize=11)
    errors = [each.error for each in sums.values() if each.error > 0]
    least = 10.0 ** math.floor(math.log10(min(errors))) if errors else 1e-3
    axes.set_xscale("symlog", linthresh=least, linscale=0.5)
    times = [us for _, us in (*points.values(), mine)]
    if min(times) > 0 and max(times) / min(times) > _WIDE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.margins(y=0.12)
    else:
        axes.set_ylim(bottom=0, top=1.15 * max(times))
    axes.margins(x=0.12)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.11), ncols=2, frameon=False, fontsize=11)
    canvas.draw()  # lays out, so that labels know their place;
    figure.set_layout_engine("none")  # they must not move it
    _label(axes, canvas.get_renderer(), points, mine)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :].replace("<svg", '<svg role="img" aria-label="time against error"', 1)


def _label(
    axes: Axes, renderer: Any, points: Mapping[str, tuple[float, float]], plan: tuple[float, float]
) -> None:
    """Write each name beside its point, where it covers no other, with a thin line to it where it is far."""
    from matplotlib.transforms import Bbox

    scale = axes.figure.dpi / 72
    taken: list[Bbox] = []
    for x, y in axes.transData.transform([*points.values(), plan]):
        reach = _MARKER * scale
        taken.append(Bbox([[x - reach, y - reach], [x + reach, y + reach]]))
    for name, point in sorted(points.items(), key=lambda item: (item[1][1], item[0])):
        best: tuple[float, Any] | None = None
        for up in _STEPS:
            for side in (1, -1):
                note = axes.annotate(
                    name, point, xytext=(side * 9, up), textcoords="offset points", fontsize=10, va="center",
                    ha="left" if side > 0 else "right",
                    arrowprops={"arrowstyle": "-", "color": "#9aa5b1", "lw": 0.6} if abs(up) > 11 else None,
                )  # fmt: skip
                bad = _covered(_text_box(note, renderer), taken, axes.bbox)
                if best is None or bad < best[0]:
                    if best is not None:
                        best[1].remove()
                    best = bad, note
                else:
                    note.remove()
            if best is not None and best[0] == 0:
                break
        assert best is not None
        taken.append(_text_box(best[1], renderer))


def _text_box(note: Any, renderer: Any) -> Bbox:
    """Of the words alone, without the line."""
    from matplotlib.text import Text

    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer)


def _covered(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """How much of ``box``, in square pixels, lies over others or out of the frame."""
    from matplotlib.transforms import Bbox

    inside = Bbox.intersection(box, frame)
    out = box.width * box.height - (inside.width * inside.height if inside is not None else 0.0)
    over = 0.0
    for other in taken:
        shared = Bbox.intersection(box, other)
        over += shared.width * shared.height if shared is not None else 0.0
    return over + (out if out > 1e-6 else 0.0)
