"""Fixtures of several files."""

from __future__ import annotations

import pytest
from checkpoint_nets import make

import ao_core as ao


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of ``make(0)`` in several shards."""
    path = tmp_path / "saved"
    ao.save(make(), path, shard_bytes=9000)
    return path
