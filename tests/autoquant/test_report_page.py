"""The HTML report in a real browser: what a person sees."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib
from html import escape

import pytest
import torch
from torch import nn

from ao_autoquant import Budget, explore, pareto, report
from ao_autoquant.pipeline import carry_out

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 1200, 1600


def rendered(test):
    """Asks for a browser, and takes a while."""
    why = "no chromium is on PATH to render the page: install chromium"
    return pytest.mark.slow(pytest.mark.skipif(BROWSER is None, reason=why)(test))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a search with a check, as a file, beside what it is about."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("page")
    blocks = [(f"layers.{i}.mlp.up_proj", nn.Linear(64, 64)) for i in range(6)]
    model = nn.Sequential(*(module for _, module in blocks), nn.Conv1d(1, 1, 3), nn.Flatten(1)).eval()
    model[5].weight.data *= 3
    x = torch.randn(4, 1, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AO_AUTOQUANT_CACHE", "off")
        found = explore(
            model, x, schemes=["int8-weight-only", "int4-weight-only:group_size=32", "uint4", "semi-sparse"],
            error="loss", isolate=False,
        )  # fmt: skip
    budget = Budget(max_error=0.5)
    outcome = carry_out(model, found, x, objective="bytes", budget=budget, check=True)
    text = report.html(
        found, outcome.chosen, title="ao autoquant a <model>", objective="bytes", budget=budget,
        plan=outcome.plan,
    )  # fmt: skip
    file = folder / "report.html"
    report.write(file, text)
    return file, found, outcome


def browse(file, folder, *arguments):
    """Run the browser on ``file``, with a profile of its own; what it prints."""
    switches = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{HEIGHT}",
    )  # fmt: skip
    done = subprocess.run(
        [BROWSER, *switches, *arguments, file.as_uri()], capture_output=True, timeout=120, check=True
    )
    return done.stdout.decode()


def pixels(data: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and the rows of a PNG of 8-bit RGB or RGBA, as in its specification (RFC 2083)."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    place, packed, header = 8, b"", b""
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert zlib.crc32(kind + body) == struct.unpack(">I", data[place + 8 + size :][:4])[0]
        header, packed = (body if kind == b"IHDR" else header), packed + (body if kind == b"IDAT" else b"")
        place += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", header[:10])
    assert depth == 8 and colour in (2, 6)
    channels, raw = (3 if colour == 2 else 4), zlib.decompress(packed)
    stride = 1 + width * channels
    assert len(raw) == height * stride
    return width, height, [raw[start + 1 : start + stride] for start in range(0, len(raw), stride)]


@rendered
def test_the_picture_is_not_blank(page, tmp_path):
    file, *_ = page
    shot = tmp_path / "page.png"
    browse(file, tmp_path, f"--screenshot={shot}")
    width, height, rows = pixels(shot.read_bytes())
    assert (width, height) == (WIDTH, HEIGHT)
    drawn = [number for number, row in enumerate(rows) if len(set(row)) > 1]
    assert len(drawn) > HEIGHT / 5 and drawn[0] < 100  # lines of text and the plot, from the top on


@rendered
def test_the_page_holds_layers_reasons_and_the_plot(page, tmp_path):
    file, found, outcome = page
    dom = browse(file, tmp_path, "--dump-dom")
    for layer, reason in found.left.items():
        assert f"<td>{layer}</td>" in dom and escape(reason, quote=False) in dom
    for layer, scheme in outcome.chosen.items():
        assert f"<td>{layer}</td>" in dom and scheme in dom
    assert "ao autoquant a &lt;model&gt;" in dom
    assert "hold more than two non-zeros" in dom  # why semi-sparse fits none
    plot = dom[dom.index("Time against error") : dom.index("Layers by schemes")]
    assert plot.count("<svg") == 1 and "</svg>" in plot
    for scheme in found.uniform():
        assert scheme in plot
    assert "nats" in plot and "the plan" in plot


def test_labels_of_points_that_lie_close_cover_no_other():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6))
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    points = {f"int4-weight-only:group_size={n}": (5 + 0.1 * n, 5 + 0.03 * (n % 3)) for n in range(9)}
    pareto._label(axes, canvas.get_renderer(), points, (5.2, 4.9))
    canvas.draw()
    boxes = [pareto._text_box(note, canvas.get_renderer()) for note in axes.texts]
    assert [note.get_text() for note in axes.texts] == sorted(
        points, key=lambda name: (points[name][1], name)
    )
    for number, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert not any(box.contains(*axes.transData.transform(point)) for point in points.values())
