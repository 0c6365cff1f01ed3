"""A walk that was killed goes on where it was, with the same codes as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_models import data, model_of

import ao_core as ao

RUN = """
import sys, time
sys.path.insert(0, {folder!r})
import torch
from small_models import data, model_of
import ao_core as ao
from ao_gptq.algorithm import Gptq

torch.set_num_threads(1)
visit = Gptq.visit
def slow(self, stage):
    visit(self, stage)
    if stage.name == "2":
        time.sleep(600)
Gptq.visit = slow
ao.compress_(model_of(4), {algorithms!r}, data(), scheme={scheme!r}, resume={directory!r})
"""


def weights(model):
    found = {}
    for name, weight in model.named_parameters():
        parts = weight.stored() if isinstance(weight, ao.QuantizedTensor) else {"": weight}
        found |= {f"{name}:{part}": value.detach() for part, value in parts.items()}
    return found


@pytest.mark.parametrize(
    ("algorithms", "scheme"),
    [
        (["gptq"], "int4-weight-only:group_size=32"),
        (["smoothquant", "gptq:asymmetric=0.5,true_sequential=True"], "int8-dynamic"),
    ],
)
def test_kill_minus_nine_in_the_third_block(algorithms, scheme, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        directory = tmp_path / "walk"
        script = RUN.format(
            folder=str(Path(__file__).parents[1] / "helpers"),
            algorithms=algorithms,
            scheme=scheme,
            directory=str(directory),
        )
        process = subprocess.Popen([sys.executable, "-c", script], env=os.environ)
        deadline = time.time() + 120
        while not (directory / "block-00001.safetensors").is_file() and time.time() < deadline:
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert sorted(path.name for path in directory.iterdir() if path.suffix != ".tmp") == [
            "block-00000.safetensors", "block-00001.safetensors", "walk.json"
        ]  # fmt: skip
        whole, resumed = model_of(4), model_of(4)
        expected = ao.compress_(whole, algorithms, data(), scheme=scheme)

        from ao_gptq.algorithm import Gptq

        visited, visit = [], Gptq.visit
        monkeypatch.setattr(
            Gptq, "visit", lambda self, stage: (visited.append(stage.name), visit(self, stage))
        )
        report = ao.compress_(resumed, algorithms, data(), scheme=scheme, resume=directory)
        assert visited == ["2", "3"]
        assert report.notes == expected.notes
        found = weights(resumed)
        for name, value in weights(whole).items():
            assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name
        again = model_of(4)
        ao.compress_(again, algorithms, data(), scheme=scheme, resume=directory)
        assert visited == ["2", "3"]  # nothing was left to do
    finally:
        torch.set_num_threads(threads)


def test_what_another_run_left_is_refused(tmp_path):
    ao.compress_(model_of(), "gptq:scheme=int8-weight-only", data(), resume=tmp_path)

    def again(model=None, algorithm="gptq:scheme=int8-weight-only", batches=None):
        ao.compress_(model or model_of(), algorithm, batches or data(), resume=tmp_path)

    again()
    other = model_of()
    with torch.no_grad():
        other[1].up.weight[3, 5] += 1e-3
    with pytest.raises(ao.CheckpointError, match="a walk with another model,"):
        again(model=other)
    with pytest.raises(ao.CheckpointError, match="a walk with another data,"):
        again(batches=[batch.flip(0) for batch in data()])
    with pytest.raises(ao.CheckpointError, match="a walk with another set of options,"):
        again(algorithm="gptq:scheme=int8-weight-only,percdamp=0.02")
    last = tmp_path / "block-00002.safetensors"
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(ao.CheckpointError, match=r"block-00002.safetensors is damaged"):
        again()


def test_a_directory_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ao.CheckpointError, match=r"it holds notes.txt and no walk.json"):
        ao.compress_(model_of(), "gptq:scheme=int8-weight-only", data(), resume=tmp_path)
