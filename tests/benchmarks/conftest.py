"""Options of the kernel suite, and what ends it. On a CPU every benchmark runs on two threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare import compare
from kernel_results import THREADS, Results, about, elsewhere, read

from ao_core import OptionError
from ao_core.arguments import parse_rows, parse_shapes

RESULTS = pytest.StashKey[Results]()
LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser):
    group = parser.getgroup("kernels", "ao's kernel benchmarks (test_kernels.py)")
    group.addoption("--shape", action="append", metavar="NxK", help="outputs x inputs; give several")
    group.addoption("--rows", metavar="M,M,...", help="numbers of rows of the activations")
    group.addoption("--peers", action="store_true", help="also other libraries' kernels, where installed")
    group.addoption("--results", type=Path, metavar="FILE", help="write cells; those of FILE are added to")
    group.addoption("--baseline", type=Path, metavar="FILE", help="compare; fail if a kernel is 10%% slower")


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config):
    """Ends before anything is measured where the end could not be used."""

    def option(name):  # pytest does not know them where it was not given this folder
        return config.getoption(name, default=None)

    try:
        config.stash[RESULTS] = Results(device(), option("results"))
        parse_shapes(option("shape") or [])
        parse_rows(option("rows") or "1")
        if (baseline := option("baseline")) is not None:
            held = read(baseline)
            if differ := elsewhere(about(device()), held["about"]):
                raise ValueError(f"{baseline} is of another device: {differ}. Compare where it was made.")
    except (ValueError, OptionError) as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def results(pytestconfig):
    """Where the cells of this run go."""
    return pytestconfig.stash[RESULTS]


def of_this_run(results):
    """Without what the file held before."""
    return {
        **results.data,
        "cells": {name: cell for name, cell in results.data["cells"].items() if name in results.tried},
        "not_run": {name: why for name, why in results.data["not_run"].items() if name in results.tried},
    }


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    baseline = session.config.getoption("baseline", default=None)
    results = session.config.stash.get(RESULTS, None)
    if baseline is None or results is None or not results.tried:
        return
    found = compare(of_this_run(results), read(baseline))
    session.config.stash[LINES] = found.lines()
    if found.exit_code and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(LINES, []):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def two_threads():
    """What the numbers in the documents were measured with."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)
