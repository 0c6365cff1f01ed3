"""The kernel regression suite (tests/benchmarks): whose kernels it measures, what it keeps, when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import stranger_kernels
import torch
from compare import compare, main
from kernel_results import Results, about, cell_name, read

ROOT = Path(__file__).parents[2]
SUITE = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
CELL = "stranger_linear 24x16 M=5 right"
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def suite(site, run_python):
    """The suite in a fresh process, a stranger's kernels only: ``suite("--rows", "5")``."""
    site.install("stranger", Path(stranger_kernels.__file__).read_text())
    file = ROOT / "tests" / "benchmarks" / "test_kernels.py"
    fixed = ("-c", ROOT / "pyproject.toml", "--rootdir", ROOT, file, "-p", "no:cacheprovider", "-q", "-rs")
    chosen = ("-k", "stranger_linear", "--shape", "24x16", "--benchmark-only")
    return lambda *arguments: run_python(SUITE, *map(str, (*fixed, *chosen, *arguments)))


def test_a_strangers_kernels_are_measured_as_ours_are(suite, tmp_path):
    out, raw = tmp_path / "run.json", tmp_path / "raw.json"
    done = suite("--rows", "1,5", "--results", out, "--benchmark-json", raw)
    assert done.returncode == 1, done.stdout  # two of its kernels are wrong
    assert "wrong wrong: off by 0.1 of the result" in done.stdout
    assert "it wants a full moon" in done.stdout
    found = read(out)
    assert set(found["cells"]) == {CELL, CELL.replace("M=5", "M=1")}
    cell = found["cells"][CELL]
    assert cell["ratio"] == pytest.approx(cell["float_us"] / cell["us"], rel=1e-3, abs=1e-4)
    assert cell["gb_per_s"] == pytest.approx(2 * (24 * 16 + 5 * 40) / cell["us"] / 1e3, rel=1e-2, abs=1e-4)
    ceilings = found["ceilings"]
    floor = max(
        2 * (24 * 16 + 5 * 40) / ceilings["gb_per_s"] / 1e3, 2 * 24 * 16 * 5 / ceilings["tflops"] / 1e6
    )
    assert cell["share"] == pytest.approx(floor / cell["us"], rel=1e-2, abs=1e-4)
    assert found["not_run"][CELL.replace("right", "picky")] == "it rejects: it wants a full moon"
    assert found["not_run"][CELL.replace("right", "broken")] == "fails: OSError: no such instruction"
    assert found["about"] == about(HERE)
    (own,) = [each for each in json.loads(raw.read_text())["benchmarks"] if "M5" in each["name"]]
    assert own["group"] == "stranger_linear, 24×16, M=5"
    assert own["extra_info"]["us"] == pytest.approx(cell["us"], abs=1e-4)
    # pytest-benchmark's own numbers are those of the device's clock.
    which = "median" if HERE.type == "cuda" else "min"
    assert own["stats"][which] * 1e6 == pytest.approx(cell["us"], rel=1e-3, abs=1e-3)


def test_a_run_ends_with_the_comparison(suite, tmp_path):
    base = results(tmp_path / "base.json", {CELL: 1e9, "stranger_linear 9x9 M=1 right": 1.0}).path
    right = ("--rows", "5", "-k", "stranger_linear and right", "--baseline", base)
    done = suite(*right)
    assert done.returncode == 1
    assert f"SLOWER: {CELL}: 1000000000.00 -> " in done.stdout
    assert "1 cells compared, 0 new, 1 of the baseline not tried" in done.stdout
    results(base, {CELL: 1e-9})
    assert suite(*right).returncode == 0


def test_a_run_that_could_not_be_compared_does_not_begin(suite, tmp_path):
    base = results(tmp_path / "base.json", {CELL: 1.0}).path
    held = json.loads(base.read_text())
    held["about"]["device_name"] = "NVIDIA H100 80GB HBM3"
    base.write_text(json.dumps(held))
    done = suite("--baseline", base)
    assert done.returncode == 4
    assert "is of another device: device_name" in done.stderr
    assert "NVIDIA H100" in done.stderr
    done = suite("--results", base)
    assert done.returncode == 4
    assert "was measured elsewhere (device_name 'NVIDIA H100" in done.stderr
    assert "--shape takes NxK" in suite("--shape", "24").stderr


def test_peers_that_are_not_there_are_named(suite, tmp_path):
    done = suite("--rows", "3", "-k", "int8_mm or gemlite", "--peers", "--results", tmp_path / "run.json")
    assert done.returncode == 0, done.stdout
    found = read(tmp_path / "run.json")
    assert found["not_run"][cell_name("int8_mm", 24, 16, 3, "cuBLAS")] == "cuBLAS takes 17 rows and more"
    assert (
        "gemlite can't be imported" in found["not_run"][cell_name("int8_weight_linear", 24, 16, 3, "gemlite")]
    )
    assert not found["peers"]
    assert "--peers was not given" in suite("--rows", "3", "-k", "cuBLAS").stdout


def results(path, ratios, **not_run):
    path.unlink(missing_ok=True)
    made = Results(HERE, path)
    for name, ratio in ratios.items():
        made.add(name, {"us": 10.0, "float_us": 10.0 * ratio, "ratio": ratio})
    for name, reason in not_run.items():
        made.add(name, reason)
    return made


def test_what_is_ten_percent_slower_against_bf16_fails(tmp_path):
    base = results(tmp_path / "base.json", {"a": 2.0, "b": 2.0, "c": 1.0, "d": 1.0, "e": 1.0}).data
    run = results(tmp_path / "run.json", {"a": 1.83, "b": 1.82, "c": 1.2, "f": 1.0}, d="it rejects: no").data
    found = compare(run, base)
    assert (found.slower, found.exit_code) == ([], 1)
    assert found.gone == ["d: it rejects: no"]
    assert [line.split(":")[0] for line in found.faster] == ["c"]
    assert (found.compared, found.new, found.left) == (3, 1, 1)
    run["cells"]["a"]["ratio"] = 1.79
    assert compare(run, base).slower == ["a: 2.00 -> 1.79 times bf16 (10.0 of 20.0 µs -> 10.0 of 18.3)"]
    del base["cells"]["d"]
    assert compare(run, base).exit_code == 1
    run["cells"]["a"]["ratio"] = 1.9
    assert compare(run, base).exit_code == 0


def test_a_slower_clock_is_no_regression():
    base, run = (
        {"about": {}, "not_run": {}, "cells": {"a": {"us": us, "float_us": 2 * us, "ratio": 2.0}}}
        for us in (10.0, 15.0)
    )
    assert compare(run, base).lines() == ["1 cells compared, 0 new, 0 of the baseline not tried"]


def test_other_versions_are_told_and_compared(tmp_path):
    base, run = (results(tmp_path / name, {"a": 1.0}).data for name in ("base.json", "run.json"))
    base["about"]["torch"] = "2.0"
    found = compare(run, base)
    assert found.notes == [f"note: torch 2.0 in the baseline, {torch.__version__} in the run"]
    assert found.exit_code == 0


def test_files_that_can_not_be_compared(tmp_path, capsys):
    run = results(tmp_path / "run.json", {"a": 1.0}).path
    base = results(tmp_path / "base.json", {"b": 1.0}).path
    assert main(str(run), str(base)) == 2
    assert "no cell in common" in capsys.readouterr().out
    held = json.loads(base.read_text())
    for change, words in (
        ({"about": {**held["about"], "device_name": "another"}}, "of different devices: device_name"),
        ({"format": 9}, "is of format 9, and this version reads 1"),
        ({"cells": None}, ""),
    ):
        base.write_text(
            json.dumps({key: value for key, value in {**held, **change}.items() if value is not None})
        )
        assert main(str(run), str(base)) == 2
        assert words in capsys.readouterr().out
    assert main(str(run), str(tmp_path / "none.json")) == 2
    assert "can't be read as kernel results" in capsys.readouterr().out


def test_a_file_is_added_to_and_written_whole(tmp_path):
    path = tmp_path / "folder" / "run.json"
    first = Results(HERE, path)
    first.add("a", {"ratio": 1.0})
    first.add("b", "fails: today")
    second = Results(HERE, path)
    second.add("b", {"ratio": 2.0})
    second.add("p", {"ratio": 3.0}, peer=True)
    held = read(path)
    assert held["cells"] == {"a": {"ratio": 1.0}, "b": {"ratio": 2.0}}
    assert (held["peers"], held["not_run"]) == ({"p": {"ratio": 3.0}}, {})
    assert second.tried == {"b", "p"}
    assert [each.name for each in path.parent.iterdir()] == ["run.json"]
