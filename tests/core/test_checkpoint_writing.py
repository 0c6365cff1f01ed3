"""What is in the way of a save, and what a save that ends early leaves."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import checkpoint_nets
import pytest
import torch
from checkpoint_nets import Net, assert_same, make, tensors_of
from safetensors import SafetensorError

import ao_core as ao
from ao_core import shards

pytestmark = pytest.mark.usefixtures("plain_environment")


# What is in the way of a save.


def test_another_directory_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ao.CheckpointError, match=r"holds notes.txt and no ao.json.*new or empty"):
        ao.save(make(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    yield tmp_path / "file"
    yield tmp_path / "file" / "below" / "it"
    yield from (Path(place) for place in ("/dev/null/x", "/proc/x") if Path(place).parent.exists())


def test_a_place_that_cannot_be_written(tmp_path):
    """Said before anything is computed; root, who may write anywhere, is told too."""
    for place in unwritable(tmp_path):
        with pytest.raises(ao.CheckpointError, match=r"can't save to .*Give a"):
            shards.check_target(place)
        with pytest.raises(ao.CheckpointError, match="can't save to"):
            ao.save(make(), place)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_looking_at_a_place_leaves_no_trace(tmp_path):
    shards.check_target(tmp_path / "new" / "deep")
    shards.check_target(tmp_path)
    assert list(tmp_path.iterdir()) == []


def fail_at(number, error):
    """A ``save_file`` that raises ``error`` at the given call, after writing half a file."""
    calls = []

    def save_file(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == number:
            Path(path).write_bytes(b"half a file")
            raise error
        real(tensors, path, metadata=metadata)

    real = shards.save_file
    return save_file


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, error, overwrite):
    """The error says so; the old checkpoint is whole, and nothing half-written is left."""
    path = tmp_path / "saved"
    if overwrite:
        ao.save(make(0), path, shard_bytes=9000)
        before = {file.name: file.read_bytes() for file in path.iterdir()}
    monkeypatch.setattr(shards, "save_file", fail_at(2, error))
    with pytest.raises(
        ao.CheckpointError, match=r"(?i)can't write to .*No space left.*unchanged.*Free some space"
    ):
        ao.save(make(1), path, shard_bytes=9000)
    if overwrite:
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        assert_same(make(0), ao.load(path, model=Net))
    else:
        assert not path.exists()


def test_too_little_space_is_known_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ao.CheckpointError, match=r"0 MB are needed and 0 MB are free.*Free some space"):
        ao.save(make(), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_any_other_failure_leaves_the_old_checkpoint(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    monkeypatch.setattr(shards, "save_file", fail_at(3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        ao.save(make(1), saved, shard_bytes=9000)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_overwriting_leaves_only_the_new(saved):
    net = make(1)
    ao.save(net, saved)
    assert_same(net, ao.load(saved, model=Net))
    assert len(list(saved.iterdir())) == 2
    ao.save(net, saved)
    assert_same(net, ao.load(saved, model=Net))


def test_a_model_can_be_saved_over_what_it_was_loaded_from(saved):
    net = ao.load(saved, model=Net)
    with torch.no_grad():
        net.body[0].bias.add_(1)
    expected = tensors_of(net)
    ao.save(net, saved)
    assert tensors_of(ao.load(saved, model=Net)).keys() == expected.keys()
    assert torch.equal(ao.load(saved, model=Net).body[0].bias, expected["body.0.bias:"])


KILLED = """
import os, pathlib, signal, sys, torch, ao_core as ao
from ao_core import shards

moment, path, tests = sys.argv[1:]
sys.path.insert(0, tests)
import checkpoint_nets

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

calls = []
real_save, real_replace, real_unlink = shards.save_file, pathlib.Path.replace, pathlib.Path.unlink

def save_file(tensors, file, metadata=None):
    calls.append(file)
    if moment == "first shard" or (moment == "second shard" and len(calls) == 2):
        pathlib.Path(file).write_bytes(b"half a file")
        die()
    real_save(tensors, file, metadata=metadata)

def replace(self, target):
    if moment == "before the index" and pathlib.Path(target).name == "ao.json":
        die()
    return real_replace(self, target)

def unlink(self, *args, **kwargs):
    if moment == "before the old shards go" and self.suffix == ".safetensors":
        die()
    return real_unlink(self, *args, **kwargs)

shards.save_file, pathlib.Path.replace, pathlib.Path.unlink = save_file, replace, unlink
ao.save(checkpoint_nets.make(1), path, shard_bytes=9000)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize(
    ("moment", "survivor"),
    [("first shard", 0), ("second shard", 0), ("before the index", 0), ("before the old shards go", 1)],
)
def test_kill_while_overwriting(saved, run_python, moment, survivor):
    """The old checkpoint or the new one, bit for bit; the next save tidies up."""
    done = run_python(KILLED, moment, str(saved), str(Path(checkpoint_nets.__file__).parent))
    assert done.returncode == -9, done.stderr
    assert_same(make(survivor), ao.load(saved, model=Net))
    ao.save(make(2), saved)
    assert_same(make(2), ao.load(saved, model=Net))
    assert len(list(saved.iterdir())) == 2, "leftovers of the killed save"


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("moment", ["second shard", "before the index"])
def test_kill_during_the_first_save(tmp_path, run_python, moment):
    """No checkpoint, said plainly; saving again to the same place works and tidies up."""
    path = tmp_path / "new"
    done = run_python(KILLED, moment, str(path), str(Path(checkpoint_nets.__file__).parent))
    assert done.returncode == -9, done.stderr
    with pytest.raises(ao.CheckpointError, match=r"holds no ao\.json"):
        ao.load(path, model=Net)
    ao.save(make(2), path)
    assert_same(make(2), ao.load(path, model=Net))
    assert len(list(path.iterdir())) == 2, "leftovers of the killed save"
