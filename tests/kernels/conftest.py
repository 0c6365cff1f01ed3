"""Where the kernels run: compiled on a GPU, else by Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch

# Triton is for Linux alone.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session")
def device():
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
