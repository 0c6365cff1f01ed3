"""``ao bench``: the kernels of any plugin, checked, timed and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import stranger_kernels
import torch


@pytest.fixture
def run(site, run_ao):
    site.install("stranger", Path(stranger_kernels.__file__).read_text())
    return lambda *arguments: run_ao("bench", "--op", "stranger_linear", "--shape", "24x16", *arguments)


def test_kernels_of_a_stranger_are_measured(run):
    rows = json.loads(run("--rows", "1,5", "--json").stdout)
    assert [(row["rows"], row["n"], row["k"]) for row in rows] == [(1, 24, 16)] * 4 + [(5, 24, 16)] * 4
    found = {row["provider"]: row for row in rows if row["rows"] == 5}
    right = found.pop("right")
    assert right["us"] > 0
    assert right["reason"] is None
    assert right["ratio"] == pytest.approx(right["float_us"] / right["us"])
    assert right["gb_per_s"] == pytest.approx((24 * 16 * 2 + 2 * 5 * 40) / right["us"] / 1e3)
    assert right["tflops"] == pytest.approx(2 * 24 * 16 * 5 / right["us"] / 1e6)
    assert right["share"] > 0
    assert {row["us"] for row in found.values()} == {row["float_us"] for row in found.values()} == {None}
    assert found["wrong"]["reason"] == "wrong: off by 0.1 of the result"
    assert found["broken"]["reason"] == "fails: OSError: no such instruction"
    assert found["picky"]["reason"] == "it wants a full moon"


def test_the_table_holds_what_ran_and_the_rest_is_said(run):
    done = run("--rows", "3")
    assert done.returncode == 0
    assert "right" in done.stdout
    assert "24×16" in done.stdout
    assert "picky" not in done.stdout
    assert "stranger_linear, picky, 24×16, 3 rows: it wants a full moon" in done.stderr


@pytest.mark.parametrize(
    ("name", "start"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml"), ("p.html", b"<!doctype html>")]
)
def test_ratios_are_drawn(run, tmp_path, name, start):
    pytest.importorskip("matplotlib")
    assert run("--rows", "1,4", "--plot", str(tmp_path / name)).returncode == 0
    data = (tmp_path / name).read_bytes()
    assert data.startswith(start)
    assert len(data) > 5000
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "24"), "--shape takes NxK, such as 14336x4096, and was given '24'"),
        (("--rows", "1,-2"), "--rows takes whole numbers above 0"),
        (("--plot", "p.gif"), "--plot draws .png, .svg or .html, and was given p.gif"),
        (("--plot", "nowhere/p.png"), "there is no directory nowhere"),
        (("--op", "stranger_silent"), "op stranger_silent makes no problem of a wanted size"),
        (("--op", "stranger_liner"), "stranger_linear"),
        (("--dtype", "int8"), "int8"),
        (("--device", "cuda:99"), "cuda"),
        (("--device", "meta"), "--device 'meta' can't be used"),
        pytest.param(
            ("--plot", "/proc/p.png"),
            "can't draw /proc/p.png",
            marks=pytest.mark.skipif(not Path("/proc").exists(), reason="all folders here are writable"),
        ),
    ],
)
def test_wrong_usage_is_named(run, arguments, words):
    done = run(*arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="minutes on a GPU's shapes")
def test_ao_bench_alone_takes_every_op(run_ao):
    rows = json.loads(
        run_ao("bench", "--shape", "32x64", "--rows", "2", "--json", TRITON_INTERPRET="0").stdout
    )
    assert {"int4_weight_linear", "nf4_linear", "int8_mm"} <= {row["op"] for row in rows if row["us"]}
