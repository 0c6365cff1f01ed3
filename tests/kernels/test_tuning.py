"""Measured tiles: how they are kept and found again, and that wrong ones are never used."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import subprocess
import sys

import pytest
import torch

from ao_core import AoError
from ao_kernels import tiles, trials, tuning, weight_linear
from ao_kernels.configs import Decoded, Few, Gemm, Many, Parts, Registers, Specialized, weight_config
from ao_kernels.tiles import Cell

CELL = Cell("int4", 33, 96, "bfloat16", 4)
FEW = Few(2, 16, 4, 2, 32, 3)


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """A file of tiles of this test's own, not there yet."""
    path = tmp_path / "folder" / "tiles.sqlite"
    monkeypatch.setenv("AO_KERNELS_TILES", str(path))
    tiles.forget()
    yield path
    tiles.forget()


def find(device, rows=4, n=33, dtype=torch.bfloat16):
    return tiles.find("int4", rows, n, 96, dtype, device)


@pytest.mark.parametrize(
    "found",
    [
        FEW,
        Many(64, 32, 4, 32, 3, 2),
        Specialized(64, 128, 64, 4, 2, 1, 4),
        Registers(64, 8, 3, 1, 4),
        Parts(4, 64, 16, 64, 2),
        Decoded(8),
        Gemm("pointers", 16, 32, 64, 4, 3, 0, 1),
    ],
)
def test_what_is_kept_is_found(found, device):
    assert find(device) is None
    tiles.save(CELL, found, 12.5, device)
    assert find(device) == find(device, rows=3) == found
    assert find(device, rows=5) is find(device, n=34) is find(device, dtype=torch.float16) is None
    assert tiles.saved(device) == {CELL: found}
    tiles.clear()
    assert find(device) is None


def test_other_versions_and_devices_are_not_used(file, device):
    for column, value in (("device", "another"), ("kernels", 0), ("triton", "2.0"), ("torch", "2.0")):
        tiles.save(CELL, FEW, 12.5, device)
        with sqlite3.connect(file) as store:
            store.execute(f"UPDATE tiles SET {column} = ?", (value,))
        tiles.forget()
        assert find(device) is None, column
        tiles.clear()


def test_a_later_kind_of_tiles_is_passed_over(file, device):
    tiles.save(CELL, FEW, 12.5, device)
    with sqlite3.connect(file) as store:
        store.execute("UPDATE tiles SET tiles = ?", (json.dumps({"kernel": "newer", "a": 1}),))
    tiles.forget()
    assert find(device) is None


@pytest.mark.parametrize("harm", ["text", "cut off", "another format", "another table"])
def test_an_unusable_file_is_set_aside_with_one_warning(file, device, harm):
    tiles.save(CELL, FEW, 12.5, device)
    if harm == "text":
        file.write_text("not a database, but long enough to be taken for one " * 50)
    elif harm == "cut off":
        file.write_bytes(file.read_bytes()[:3000])
    else:
        with sqlite3.connect(file) as store:
            store.execute(
                "PRAGMA user_version = 9" if harm == "another format" else "ALTER TABLE tiles RENAME TO t"
            )
    tiles.forget()
    held = file.read_bytes()
    with pytest.warns(RuntimeWarning, match=r"are not used: .*tiles\.unusable.*ao kernels tune") as warned:
        found = [find(device), find(device)]
    assert found == [None, None]
    assert len(warned) == 1
    assert file.with_suffix(".unusable").read_bytes() == held
    tiles.save(CELL, FEW, 12.5, device)
    assert find(device) == FEW


def test_a_folder_that_cant_be_written_is_named(tmp_path, monkeypatch, device):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("AO_KERNELS_TILES", str(tmp_path / "taken" / "tiles.sqlite"))
    tiles.forget()
    assert find(device) is None
    with pytest.raises(AoError, match=r"can't write the tiles to .*taken.*AO_KERNELS_TILES"):
        tiles.save(CELL, FEW, 12.5, device)


def test_off_is_off(monkeypatch, device):
    tiles.save(CELL, FEW, 12.5, device)
    monkeypatch.setenv("AO_KERNELS_TILES", "off")
    tiles.forget()
    assert find(device) is None
    with pytest.raises(AoError, match="AO_KERNELS_TILES=off"):
        tiles.save(CELL, FEW, 12.5, device)


def test_processes_write_at_once(file, device):
    code = (
        "import sys, torch; from ao_kernels import tiles; from ao_kernels.configs import Decoded\n"
        "n, device = int(sys.argv[1]), torch.device(sys.argv[2])\n"
        "for i in range(20): tiles.save(tiles.Cell('int4', n, i, 'bfloat16', 1), Decoded(i), 1.0, device)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(n), device.type], env=dict(os.environ))
        for n in (1, 2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    tiles.forget()
    assert len(tiles.saved(device)) == 40


def test_launchers_use_what_is_kept(monkeypatch, device):
    used = []
    monkeypatch.setattr(weight_linear, "_few", lambda *arguments: used.append(arguments[-1]))
    rows, codes = (
        torch.zeros(3, 96, dtype=torch.bfloat16, device=device),
        torch.zeros(33, 48, dtype=torch.uint8),
    )
    weight = weight_linear.Codes("int4", codes.to(device), torch.ones(33, 1, device=device))
    weight_linear.weight_linear(rows, weight, None)
    tiles.save(CELL, FEW, 12.5, device)
    weight_linear.weight_linear(rows, weight, None)
    assert used == [weight_config("int4", 3, 33, 96), FEW]


def test_the_number_of_rows_is_rounded_up():
    assert [tiles.bucket(rows) for rows in (1, 2, 3, 4, 5, 1000, 9999)] == [1, 2, 4, 4, 8, 1024, 8192]


MOST_SHARED = 232_448  # bytes of shared memory that a program may use


@pytest.mark.parametrize("kind", tuning.KINDS)
@pytest.mark.parametrize("rows", [1, 16, 64, 1024])
@pytest.mark.parametrize("on_hopper", [False, True])
def test_candidates_are_few_and_begin_with_the_table(kind, rows, on_hopper):
    cell = Cell(kind, 4096, 4096, "bfloat16", rows)
    found = tuning.candidates(cell, on_hopper)
    assert found[0] == tuning.default(cell, on_hopper)
    assert len(set(found)) == len(found)
    assert 1 <= len(found) <= 150
    specialized = [each for each in found if isinstance(each, Specialized)]
    assert bool(specialized) == (on_hopper and rows >= 16 and kind != "int8-dynamic")
    for each in specialized:
        columns = each.bytes * (2 if kind in ("int4", "nf4") else 1)
        slots = each.ring * 2 * columns * (each.block_m + each.block_n)
        assert slots + each.codes_ring * 128 * each.block_n < MOST_SHARED
    registers = [each for each in found if isinstance(each, Registers)]
    assert bool(registers) == bool(specialized)
    for each in registers:
        staged = 4 * 64 * min(each.block_m, 64)
        assert each.ring >= 4
        assert 128 * each.ring * each.block_m + each.codes_ring * 128 * 128 + staged < MOST_SHARED
    of_parts = [each for each in found if isinstance(each, Parts)]
    assert bool(of_parts) == (on_hopper and rows == 16 and kind != "int8-dynamic")
    assert all(shared_of_parts(kind, each) < MOST_SHARED for each in of_parts)


def shared_of_parts(kind, tiles):
    """At most: scales twice, two numbers each with int4, and the table of NF4 levels."""
    columns = tiles.bytes * (2 if kind in ("int4", "nf4") else 1)
    slots = tiles.ring * tiles.parts * (tiles.bytes * tiles.block_n + 2 * columns * tiles.block_m)
    scales = 2 * 32 * tiles.block_n * (8 if kind == "int4" else 4)
    return slots + scales + (32 * 1024 if kind == "nf4" else 0) + 1024


@pytest.mark.parametrize("kind", ["int4", "nf4", "int8", "float8"])
def test_the_table_fits_the_shared_memory(kind):
    cells = itertools.product(range(1, 200), (16, 1024, 2048, 4096, 9999), (64, 9999), (False, True))
    every = {weight_config(kind, m, n, k, hopper=True, fine=fine) for m, n, k, fine in cells}
    of_parts = [each for each in every if isinstance(each, Parts)]
    assert len(of_parts) > 4
    for each in of_parts:
        assert shared_of_parts(kind, each) < MOST_SHARED, each


def test_results_that_differ_from_call_to_call_exclude_tiles():
    calls = iter(range(100))
    expected = torch.ones(1000, dtype=torch.float64)

    class OnCuda:
        """An expected value that is asked whether it lies on a GPU: there calls are repeated."""

        is_cuda = True

        def __rsub__(self, other):
            return other - expected

    def run(tiles):
        return torch.ones(1000) + 1e-6 * (next(calls) == 3)

    assert trials._reason(run, FEW, OnCuda(), 1e-2) == "wrong: results differ from call to call"
    assert trials._reason(run, FEW, OnCuda(), 1e-2) == ""


def tune(*arguments, **settings):
    return subprocess.run(
        [sys.executable, "-c", "from ao_core.cli import main; main()", "kernels", "tune", *arguments],
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **settings},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a MODEL, or --shape NxK"),
        (("--shape", "4096"), "--shape takes NxK, such as 14336x4096, and was given '4096'"),
        (("--shape", "0x4"), "--shape takes NxK"),
        (
            ("--shape", "16x64", "--kind", "int5"),
            "--kind takes int4, nf4, int8, float8, int8-dynamic, and was given int5",
        ),
        (("--shape", "16x64", "--rows", "0"), "--rows takes whole numbers above 0"),
        (("--shape", "16x64", "--dtype", "float32"), "--dtype takes bfloat16 or float16"),
    ],
)
def test_wrong_usage_is_named(arguments, words, device):
    done = tune(*arguments, "--device", device.type)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "--device takes cuda or cuda:N"), ("meta", "not on meta"), ("cpu", "not on cpu")],
)
def test_devices_that_tiles_are_not_measured_on(device, words):
    done = tune("--shape", "16x64", "--device", device, TRITON_INTERPRET="0")
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = tune("--shape", "16x64")
    assert done.returncode == 1
    assert "tiles are measured on a GPU, and torch sees none" in done.stderr


def test_the_command_keeps_what_it_finds_and_goes_on_where_it_was(file, device):
    arguments = (
        "--shape",
        "16x32",
        "--kind",
        "int8-dynamic",
        "--rows",
        "17",
        "--device",
        device.type,
        "--json",
    )
    first = json.loads(tune(*arguments, "--workers", "0").stdout)
    assert [(row["kind"], row["n"], row["k"], row["rows"]) for row in first["found"]] == [
        ("int8-dynamic", 16, 32, 32)
    ]
    assert first["file"] == str(file)
    again = json.loads(tune(*arguments).stdout)
    assert (again["found"], again["measured_before"]) == ([], 1)
