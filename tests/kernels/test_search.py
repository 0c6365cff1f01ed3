"""Searching tiles: the fastest that is right wins; one that hangs or crashes is given up, once."""

from __future__ import annotations

import pytest
from hostile_tiles import BROKEN, CRASHES, FEW, GEMM, HANGS, HANGS_LATER, RIGHT, WRONG

from ao_core import AoError
from ao_kernels import commands, tiles, trials, tuning
from ao_kernels.tiles import Cell
from ao_kernels.trials import Children, Here

CELL = Cell("int4", 16, 64, "bfloat16", 1)
LIMIT = 10  # seconds: right tiles take a fraction of one


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """A file of tiles of this test's own, not there yet."""
    path = tmp_path / "tiles.sqlite"
    monkeypatch.setenv("AO_KERNELS_TILES", str(path))
    tiles.forget()
    yield path
    tiles.forget()


@pytest.mark.parametrize("kind", tuning.KINDS)
def test_a_search_takes_the_fastest_that_is_right(kind, monkeypatch, device):
    cell = Cell(kind, 16, 64, "bfloat16", 1)
    table = tuning.default(cell)
    other = GEMM if kind == "int8-dynamic" else FEW
    times = {WRONG: 1.0, BROKEN: 1.0, other: 5.0, table: 9.0}
    monkeypatch.setattr(tuning, "candidates", lambda cell, on_hopper: [table, WRONG, BROKEN, other])
    trials._trial.cache_clear()
    make = trials._runner

    def runner(cell, arguments):
        def run(tried):
            if tried == BROKEN:
                raise RuntimeError("arange's range must be a power of 2")
            running.append(tried)
            return make(cell, arguments)(other if tried == WRONG else tried) + (tried == WRONG)

        return run

    def clock(calls, device, *, replays):
        calls[0]()
        return times[running[-1]]

    running = []
    monkeypatch.setattr(trials, "_runner", runner)
    monkeypatch.setattr(trials, "microseconds", clock)
    found = tuning.search(cell, device, Here())
    assert (found.tiles, found.microseconds, found.before) == (other, 5.0, 9.0)
    assert set(found.excluded) == {repr(WRONG), repr(BROKEN)}
    assert found.excluded[repr(WRONG)].startswith("wrong: off by")
    assert "power of 2" in found.excluded[repr(BROKEN)]
    times[other] = 8.95  # no more than noise: the table's stay
    assert tuning.search(cell, device, Here()).tiles == table


def test_no_tiles_are_right(monkeypatch, device):
    cell = Cell("int4", 16, 64, "bfloat16", 1)
    monkeypatch.setattr(trials.Trial, "check", lambda self, tiles: "wrong: off by 1")
    with pytest.raises(AoError, match=r"no tiles are right for Cell.*off by 1"):
        tuning.search(cell, device, Here())


def hostile(count):
    return Children(count, LIMIT, "hostile_tiles:answer")


@pytest.mark.parametrize("count", [2])
def test_tiles_that_hang_or_crash_are_given_up_and_the_search_goes_on(count, monkeypatch, device):
    table = tuning.default(CELL)
    every = [table, HANGS, WRONG, CRASHES, BROKEN, RIGHT]
    monkeypatch.setattr(tuning, "candidates", lambda cell, on_hopper: every)
    with hostile(count) as processes:
        found = tuning.search(CELL, device, processes)
    assert found.tiles in (table, RIGHT)
    assert found.ended == {
        HANGS: f"it took more than {LIMIT} s and was ended",
        CRASHES: "it ended its process (signal 6)",
    }
    assert set(found.excluded) == {*map(repr, (HANGS, WRONG, CRASHES, BROKEN))}
    assert found.excluded[repr(HANGS)] == found.ended[HANGS]
    assert found.excluded[repr(WRONG)].startswith("wrong: off by")
    assert "power of 2" in found.excluded[repr(BROKEN)]


def test_tiles_may_hang_only_when_they_are_timed(monkeypatch, device):
    table = tuning.default(CELL)
    monkeypatch.setattr(tuning, "candidates", lambda cell, on_hopper: [table, HANGS_LATER, RIGHT])
    with hostile(1) as processes:
        found = tuning.search(CELL, device, processes)
    assert found.tiles in (table, RIGHT)
    assert set(found.ended) == {HANGS_LATER}
    assert set(found.excluded) == {repr(HANGS_LATER)}


def test_what_hung_is_kept_and_not_tried_again(monkeypatch, device):
    monkeypatch.setattr(tuning, "candidates", lambda cell, on_hopper: [CRASHES, RIGHT])
    with hostile(1) as processes:
        first = commands._searched(CELL, device, processes, {})
    assert set(first.ended) == {CRASHES}
    kept = tiles.faults("int4", device)
    assert kept == {repr(CRASHES): "it ended its process (signal 6)"}
    assert tiles.faults("nf4", device) == {}
    tried = []
    monkeypatch.setattr(Here, "check", lambda self, cell, which, device: tried.append(which) or [None])
    again = commands._searched(CELL, device, Here(), kept)
    assert tried == [[RIGHT]]
    assert again.excluded == kept
    assert again.ended == {}


def test_what_hung_is_kept_also_where_no_tiles_are_right(monkeypatch, device):
    monkeypatch.setattr(tuning, "candidates", lambda cell, on_hopper: [CRASHES, WRONG])
    with hostile(1) as processes, pytest.raises(AoError, match="no tiles are right"):
        commands._searched(CELL, device, processes, {})
    assert set(tiles.faults("int4", device)) == {repr(CRASHES)}


def test_other_versions_try_again(file, monkeypatch, device):
    tiles.save_fault("int4", HANGS, "it hung", device)
    assert tiles.faults("int4", device) == {repr(HANGS): "it hung"}
    monkeypatch.setattr(tiles, "KERNELS_VERSION", 999)
    assert tiles.faults("int4", device) == {}


def test_a_process_that_does_not_start_is_an_error_and_no_fault(device):
    with (
        Children(1, LIMIT, "no_such_module:answer") as processes,
        pytest.raises(AoError, match="did not start"),
    ):
        processes.check(CELL, [RIGHT], device)
