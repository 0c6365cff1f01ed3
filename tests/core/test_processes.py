"""What processes tell each other while they calibrate: values of any size, and no pickle."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

from ao_core.calibrate import processes

RUN = """
import json, pickle, sys
import torch
from ao_core.calibrate import processes

def refused(*_, **__):
    raise AssertionError("something was pickled")

with processes.started(torch.device("cpu")):
    pickle.Pickler = pickle.Unpickler = pickle.dumps = pickle.loads = refused
    torch.distributed.distributed_c10d._pickler = refused
    torch.distributed.distributed_c10d._unpickler = refused
    rank = processes.rank()
    told = processes.gathered({"rank": rank, "name": "Ä" * (1 + 5000 * rank), "half": 0.1, "none": None})
    sent = {"codes": torch.arange(6, dtype=torch.uint8).view(2, 3), "scale": torch.ones(3).bfloat16() / 3}
    got = processes.broadcast(sent if rank == 1 else None, 1, torch.device("cpu"))
    shapes = {k: [list(t.shape), str(t.dtype), t.double().sum().item()] for k, t in got.items()}
    empty = processes.gathered(None)
with open(sys.argv[1] + str(rank), "w") as file:
    json.dump([told, shapes, empty], file)
"""


def test_values_and_tensors_arrive_at_both_processes(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [*launch, script, tmp_path / "out"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"out{rank}").read_text()) for rank in (0, 1))
    assert first == second
    told, shapes, empty = first
    assert told == [
        {"rank": rank, "name": "Ä" * (1 + 5000 * rank), "half": 0.1, "none": None} for rank in (0, 1)
    ]
    assert shapes["codes"] == [[2, 3], "torch.uint8", 15.0]
    assert shapes["scale"][:2] == [[3], "torch.bfloat16"]
    assert shapes["scale"][2] == pytest.approx(1, abs=0.01)
    assert empty == [None, None]


def test_one_process_hears_what_several_would():
    assert processes.gathered({"a": (1, 2)}) == [{"a": [1, 2]}]
    with pytest.raises(TypeError, match="not JSON serializable"):
        processes.gathered(pickle)
