"""Fixtures of several files."""

from __future__ import annotations

import pytest
from checkpoint_nets import make
from turn_takers import LOG, Alone, Halve, Quantize

import ao_core as ao
from ao_core import plugins, registry
from ao_core.algorithm import ALGORITHMS


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of ``make(0)`` in several shards."""
    path = tmp_path / "saved"
    ao.save(make(), path, shard_bytes=9000)
    return path


@pytest.fixture
def forgotten():
    """What a test registers is gone afterwards."""
    plugins.load()
    yield
    plugins.reset()


@pytest.fixture
def turn_takers():
    """The algorithms of that file can be named, and have noted nothing."""
    plugins.load()
    for kind in (Halve, Quantize, Alone):
        ALGORITHMS.add(kind.name, kind, registry.Source("tests", "tests", "1"))
    LOG.clear()
    yield
    plugins.reset()
