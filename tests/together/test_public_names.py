"""``import ao_core``: light, and every public name is there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ao_core as ao

pytestmark = pytest.mark.usefixtures("plain_environment")


IMPORT = """
import sys, torch
before = set(sys.modules)
import ao_core
for name in set(ao_core.__all__) - {"testing"}:  # which needs pytest
    getattr(ao_core, name)
print(torch.cuda.is_initialized(), *{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def test_importing_is_light(run_python):
    """Beside torch little is loaded, even if every name is used."""
    initialized, *loaded = run_python(IMPORT).stdout.split()
    heavy = {"triton", "transformers", "typer", "rich", "pytest", "ao_quant", "scipy", "matplotlib", "pandas"}
    assert not heavy & set(loaded)
    assert initialized == "False", "CUDA was initialized"


def test_public_names_are_there():
    for name in ao.__all__:
        assert getattr(ao, name) is not None
    assert set(ao.__all__) <= set(dir(ao))
    with pytest.raises(AttributeError, match="no attribute 'quantise_'"):
        ao.quantise_  # noqa: B018
    assert issubclass(ao.RejectedError, ao.AoError)
    assert issubclass(ao.QuantizedTensor, torch.Tensor)
    assert not issubclass(ao.Scheme, nn.Module)
