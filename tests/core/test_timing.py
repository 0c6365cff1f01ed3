"""Microseconds of a call."""

from __future__ import annotations

import time

import pytest

from ao_core.timing import microseconds


def test_microseconds_of_one_call():
    calls = []

    def slow():
        calls.append(1)
        time.sleep(0.002)

    found = microseconds([slow, slow], "cpu", replays=3)
    assert len(calls) == 7  # one that does not count, and three rounds of two
    assert found >= 2000  # what sleeping takes at least
    with pytest.raises(ValueError, match="at least one call"):
        microseconds([], "cpu")
