"""A cache of its own for each test, and a small model."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def cache_file(tmp_path, monkeypatch):
    file = tmp_path / "measured.sqlite"
    monkeypatch.setenv("AO_AUTOQUANT_CACHE", str(file))
    return file


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 63), nn.ReLU(), nn.Linear(63, 17)).eval()


@pytest.fixture
def examples():
    return torch.randn(5, 100, generator=torch.Generator().manual_seed(1))
