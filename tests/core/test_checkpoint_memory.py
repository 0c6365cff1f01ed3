"""Loading makes no float weight, and peaks at the checkpoint and a shard."""

from __future__ import annotations

import os

import pytest
import torch
from checkpoint_nets import SCHEME
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ao_core as ao

pytestmark = pytest.mark.usefixtures("plain_environment")


aten = torch.ops.aten


class FloatsMade(TorchDispatchMode):
    """Float tensors on a real device that an op has written, by size."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func not in (aten.empty.memory_format, aten.detach.default):  # address space, never written
            tensors = [each for each in tree_leaves(out) if type(each) in (torch.Tensor, nn.Parameter)]
            on_cpu = [each for each in tensors if each.device.type == "cpu"]
            self.elements += [each.numel() for each in on_cpu if each.is_floating_point()]
        return out


def test_no_float_weight_is_made_on_load(tmp_path):
    """No op fills a float tensor of a converted weight's size."""

    def build():
        return nn.Sequential(nn.Linear(500, 400), nn.Linear(400, 300))

    model = build()
    with FloatsMade() as made:
        build()
    assert 500 * 400 in made.elements, "the instrument sees an initialised weight"
    ao.quantize_(model, SCHEME)
    ao.save(model, tmp_path / "saved")
    with FloatsMade() as made:
        again = ao.load(tmp_path / "saved", model=build)
    assert max(made.elements, default=0) <= 400
    x = torch.randn(3, 500)
    assert torch.equal(again(x), model(x))


PEAK = """
import re, sys, torch, ao_core as ao
from pathlib import Path
from torch import nn

def build(layers=8, size=1536):
    return nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(layers)])

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def load_and_read():
    model = ao.load("large", model=build)
    for weight in model.parameters():
        for data in weight.stored().values():
            data.max()  # pages come in when they are read
    return model

def growth(function):
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    kept = function()
    return resident("VmHWM") - before

if sys.argv[1] == "save":
    for name, model in (("small", build(2, 64)), ("large", build())):
        ao.quantize_(model.bfloat16(), "int8-weight-only")
        ao.save(model, name, shard_bytes=5_000_000)
else:
    ao.load("small", model=lambda: build(2, 64))
    print(growth(load_and_read), growth(build))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak memory to be read")
def test_loading_peaks_at_the_checkpoint_and_a_shard(run_python, tmp_path):
    """Resident memory of a fresh process, against the bytes of the files and those of the float model."""
    assert run_python(PEAK, "save").returncode == 0
    done = run_python(PEAK, "load")
    assert done.returncode == 0, done.stderr
    loaded, built = map(int, done.stdout.split())
    files = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert built > 8 * 1536 * 1536 * 4 - 1_000_000, "the instrument sees a float model"
    # Memory that the process had freed before is used again, and does not show: hence the tenth.
    assert 0.9 * files < loaded < files + 2 * 5_000_000, f"{loaded} bytes for files of {files}"
