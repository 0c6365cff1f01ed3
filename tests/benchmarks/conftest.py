"""Every benchmark here runs on two threads, as the numbers in the documents did."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--peers", action="store_true", help="also other libraries' kernels, where installed")


@pytest.fixture(autouse=True)
def two_threads():
    """What the numbers in the documents were measured with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
