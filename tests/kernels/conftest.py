"""Where the kernels run: compiled on a GPU, else by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def device():
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
