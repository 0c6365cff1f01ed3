"""Two processes under torchrun share batches and column loops, and end with one process's codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import data, model_of

import ao_core as ao
from ao_core.calibrate import Absmax, Hessian, PairedHessian, Sample, SquaredNorm, processes

RUN = """
import sys
sys.path.insert(0, {folder!r})
import torch
from small_models import data, model_of
import ao_core as ao
from ao_core.calibrate import processes

torch.set_num_threads(1)
with processes.started(torch.device("cpu")):
    assert processes.world() == 2
    model, batches = model_of(), data(5)
    report = ao.compress_(model, {algorithm!r}, batches, scheme={scheme!r})
    codes = {{n: w.dequantize() for n, w in model.named_parameters() if "weight" in n and w.ndim == 2}}
    stored = [t for w in model.parameters() if isinstance(w, ao.QuantizedTensor) for t in w.stored().values()]
    assert stored and all(t.untyped_storage().nbytes() == t.nbytes for t in stored)  # they can be saved
    torch.save({{"codes": codes, "notes": report.notes}}, {out!r} + str(processes.rank()))
"""


@pytest.mark.parametrize(
    ("algorithm", "scheme"),
    [
        ("gptq", "int4-weight-only:group_size=32,zero_point=integer"),
        ("gptq:asymmetric=0.5,true_sequential=True", "int8-dynamic-int4-weight"),
        ("gptq:act_order=False", "int4-weight-only:group_size=64,zero_point=None"),
        ("gptq", "nf4"),
    ],
)
def test_two_processes_find_what_one_finds(algorithm, scheme, tmp_path):
    script = tmp_path / "run.py"
    folder = str(Path(__file__).parents[1] / "helpers")
    script.write_text(
        RUN.format(folder=folder, algorithm=algorithm, scheme=scheme, out=str(tmp_path / "out"))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"out{rank}") for rank in (0, 1))
    model = model_of()
    report = ao.compress_(model, algorithm, data(5), scheme=scheme)
    assert first["notes"].keys() == report.notes.keys()
    for name, weight in model.named_parameters():
        if isinstance(weight, ao.QuantizedTensor):
            assert torch.equal(first["codes"][name], second["codes"][name])
            assert torch.equal(first["codes"][name], weight.dequantize())
    assert all(facts["tokens"] == 2000 for facts in first["notes"].values())


def test_more_processes_than_batches_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: 4)
    with pytest.raises(ao.OptionError, match="4 processes were started for 3 batches"):
        processes.share([1, 2, 3])


def joined(mine, other, monkeypatch):
    """``mine`` as its process has it once both have joined: what the other handed in meets its own."""
    handed, tokens = [], mine.tokens + other.tokens
    monkeypatch.setattr(processes, "total", lambda count, device: tokens)
    monkeypatch.setattr(processes, "all_reduce", lambda tensor, how="sum": handed.append(tensor))
    other.join()

    def reduce(tensor, how="sum"):
        both = tensor, handed.pop(0)
        tensor.copy_(torch.maximum(*both) if how == "max" else torch.add(*both))

    monkeypatch.setattr(processes, "all_reduce", reduce)
    mine.join()
    assert not handed and mine.tokens == tokens
    return mine


def test_joined_statistics_are_those_of_all_rows(monkeypatch):
    """Two processes played by two collectors, whose reductions meet."""
    x = torch.randn(100, 63, dtype=torch.float64).float()
    for kind in (Absmax, SquaredNorm, Hessian):
        whole, halves = kind(63), [kind(63), kind(63)]
        whole.update(x)
        for half, rows in zip(halves, (x[:33], x[33:]), strict=True):
            half.update(rows)
        found = joined(*halves, monkeypatch)
        torch.testing.assert_close(found.value, whole.value, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="Sample can't be joined"):
        Sample(63).join()


@pytest.mark.parametrize("columns", [63, 300])
def test_hessians_are_the_same_bit_by_bit_however_batches_are_shared(columns, monkeypatch):
    """One process with all batches in any order, and two with a share each; also once the value was read."""
    batches = [torch.randn(50, columns) * 3**i for i in range(8)]
    floats = [batch + torch.randn(50, columns) for batch in batches]

    def made(numbers, *, read=False):
        found = PairedHessian(columns)
        for number in numbers:
            found.pair(batches[number], floats[number])
        assert not read or found.value.shape == found.cross.shape
        return found

    one = made(range(8))
    for other in (made(reversed(range(8))), joined(made([0, 2, 4, 6]), made([1, 3, 5, 7]), monkeypatch)):
        assert torch.equal(other.value, one.value) and torch.equal(other.cross, one.cross)
    late = joined(made([0, 2, 4, 6], read=True), made([1, 3, 5, 7]), monkeypatch)
    torch.testing.assert_close(late.value, one.value, rtol=1e-6, atol=1e-6 * float(one.value.max()))
    torch.testing.assert_close(late.cross, one.cross, rtol=1e-6, atol=1e-6 * float(one.cross.abs().max()))


def test_what_inputs_lack_of_the_float_models():
    x, wanted = torch.randn(100, 300), torch.randn(100, 300)
    found = PairedHessian(300)
    found.pair(x[:40].view(4, 10, 300), wanted[:40].view(4, 10, 300))
    found.pair(x[40:], wanted[40:])
    a, b = x.double(), wanted.double()
    torch.testing.assert_close(found.value.double(), 2 * a.t() @ a / 100, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.cross.double(), 2 * (b - a).t() @ a / 100, rtol=1e-4, atol=1e-4)
