"""A function in a process of its own: answers, limits, and a fresh process after a bad end."""

from __future__ import annotations

import os

import pytest

from ao_core import AoError
from ao_core.child import Child, ChildError

LONG = 60


@pytest.fixture
def child():
    with Child("child_functions:act") as made:
        yield made


def test_one_process_answers_again_and_again(child):
    assert [child.call(number, LONG) for number in (1, 2.5, 4)] == [2, 5.0, 8]
    first = child.call("who", LONG)
    assert first == child.call("who", LONG) != os.getpid()


@pytest.mark.parametrize(
    ("request_", "limit_s", "words", "hung"),
    [
        ("hang", 0.5, "it took more than 0.5 s and was ended", True),
        ("raise", LONG, "it ended its process (exit code 1)", False),
        ("abort", LONG, "it ended its process (signal 6)", False),
    ],
)
def test_a_bad_end_is_named_and_the_next_call_has_a_new_process(child, request_, limit_s, words, hung):
    before = child.call("who", LONG)
    with pytest.raises(ChildError) as caught:
        child.call(request_, limit_s)
    assert (str(caught.value), caught.value.hung) == (words, hung)
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert child.call("who", LONG) != before
    assert child.call(3, LONG) == 6


@pytest.mark.parametrize("function", ["no_such_module:act", "child_functions:no_such_name"])
def test_a_process_that_does_not_start(function):
    with Child(function) as child, pytest.raises(AoError, match=r"did not start \(exit code 1\)") as caught:
        child.call(1, LONG)
    assert not isinstance(caught.value, ChildError)
    assert function in str(caught.value)
