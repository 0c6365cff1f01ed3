"""Saving and loading: bit for bit, whole or not at all, and never through the float model."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ao_core as ao
from ao_core import plugins, shards

pytestmark = pytest.mark.usefixtures("plain_environment")
SCHEME = "int8-weight-only"
aten = torch.ops.aten


class Net(nn.Module):
    """Odd sizes, a tied head, and buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(33, 100)
        self.body = nn.Sequential(nn.Linear(100, 63), nn.ReLU(), nn.Linear(63, 100, bias=False))
        self.head = nn.Linear(100, 33)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(33)
        self.register_buffer("table", torch.arange(100.0), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, indices):
        x = self.embed(indices) + self.table / 100
        return self.norm(self.head(x + self.body(x)))


def make(seed=0, scheme=SCHEME):
    torch.manual_seed(seed)
    net = Net().eval()
    net.norm.running_mean.normal_()
    net.table.mul_(1 + seed)
    if scheme:
        ao.quantize_(net, scheme)
    return net


INDICES = torch.tensor([0, 32, 5, 17])


def tensors_of(model):
    """Everything that the model holds, by name, quantized weights taken apart."""
    held = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        parts = tensor.stored() if isinstance(tensor, ao.QuantizedTensor) else {"": tensor}
        held |= {f"{name}:{part}": data.detach() for part, data in parts.items()}
    return held


def assert_same(first, second):
    """Bit for bit, in what they hold, how it is made and what they compute."""
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys()
    for name, data in one.items():
        assert (data.dtype, data.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(data, other[name]), name
    for name, weight in first.named_parameters():
        again = second.get_parameter(name)
        assert type(again) is type(weight)
        if isinstance(weight, ao.QuantizedTensor):
            assert again.attributes() == weight.attributes()
            assert (again.scheme, again.provider, again.dtype) == (
                weight.scheme,
                weight.provider,
                weight.dtype,
            )
        assert again.requires_grad == weight.requires_grad
    assert torch.equal(first(INDICES), second(INDICES))


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of ``make(0)`` in several shards."""
    path = tmp_path / "saved"
    ao.save(make(), path, shard_bytes=9000)
    return path


def shard_files(path):
    return sorted(file.name for file in path.glob("*.safetensors"))


def index_of(path):
    return json.loads((path / "ao.json").read_text("utf-8"))


@pytest.mark.parametrize("scheme", [SCHEME, f"{SCHEME}:group_size=16", "int8-dynamic", None])
def test_round_trip(tmp_path, scheme):
    net = make(3, scheme)
    ao.save(net, tmp_path / "a" / "b")
    again = ao.load(tmp_path / "a" / "b", model=Net)
    assert not again.training
    assert again.head.weight is again.embed.weight
    assert_same(net, again)


def test_buffers_come_back_exactly(tmp_path):
    """Also those outside the state dict, which the factory computes otherwise, and after a cast."""
    net = make(2).half()
    ao.save(net, tmp_path / "saved")
    again = ao.load(tmp_path / "saved", model=Net)
    assert again.table.dtype == torch.float16
    assert torch.equal(again.table, net.table) and not torch.equal(again.table, Net().table)
    assert "table" not in again.state_dict()
    assert torch.equal(again.norm.running_mean, net.norm.running_mean)
    assert again.norm.num_batches_tracked.dtype == torch.int64
    assert again.nothing is None


def test_a_converted_tied_weight_is_saved_once(tmp_path):
    net = make(1, None)
    ao.quantize_(net, SCHEME, include=["head", "body.*"])
    ao.save(net, tmp_path / "saved")
    again = ao.load(tmp_path / "saved", model=Net)
    assert_same(net, again)
    assert again.embed.weight is again.head.weight
    assert isinstance(again.embed.weight, ao.QuantizedTensor)
    assert index_of(tmp_path / "saved")["tied"] == {"head.weight": "embed.weight"}


def test_ties_come_back_where_the_factory_does_not_tie(tmp_path):
    class Untied(Net):
        def __init__(self):
            super().__init__()
            self.head.weight = nn.Parameter(torch.empty(33, 100))

    net = make()
    ao.save(net, tmp_path / "saved")
    again = ao.load(tmp_path / "saved", model=Untied)
    assert again.head.weight is again.embed.weight
    assert_same(net, again)


def test_a_pinned_provider_and_the_plan_travel(tmp_path):
    net = make(0, None)
    plan = ao.resolve(net, [ao.Rule("body.0", SCHEME, provider="torch"), ao.Rule("*", None)])
    report = ao.apply_(net, plan)
    ao.save(net, tmp_path / "saved", plan=report.plan)
    assert ao.load(tmp_path / "saved", model=Net).body[0].weight.provider == "torch"
    assert ao.Plan.from_json(json.dumps(index_of(tmp_path / "saved")["plan"])) == plan


def test_strided_and_overlapping_tensors(tmp_path):
    """Views of one memory are saved as what they show."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            wide = torch.arange(24.0).view(4, 6)
            self.left, self.turned = nn.Parameter(wide[:, :3]), nn.Parameter(wide.t())
            self.top, self.lower = nn.Parameter(wide[:3]), nn.Parameter(wide[1:])
            self.register_buffer("one", torch.ones(1).expand(5))
            self.register_buffer("empty", torch.empty(0, 3))
            self.register_buffer("scalar", torch.tensor(7))

    model = Views()
    ao.save(model, tmp_path / "saved")
    again = ao.load(tmp_path / "saved", model=Views)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_extra_state_that_is_a_tensor(tmp_path):
    class Extra(nn.Linear):
        state = torch.zeros(2)

        def get_extra_state(self):
            return self.state

        def set_extra_state(self, state):
            self.state = state

    model = Extra(3, 2)
    model.state = torch.tensor([3.0, 4.0])
    ao.save(model, tmp_path / "saved")
    again = ao.load(tmp_path / "saved", model=lambda: Extra(3, 2))
    assert again.state.tolist() == [3, 4]


def test_what_cannot_be_saved_is_named(tmp_path):
    class Text(nn.Linear):
        def get_extra_state(self):
            return "text"

        def set_extra_state(self, state):
            pass

    bare = make()
    bare.body[0].weight.scheme = ""
    for model, words in (
        (Text(3, 2), "_extra_state.* is str, no tensor"),
        (nn.Linear(3, 2, device="meta"), "'weight' lies on the meta device"),
        (bare, "'body.0.weight' is a Int8Tensor without a scheme"),
    ):
        with pytest.raises(ao.CheckpointError, match=words):
            ao.save(model, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


def test_the_index_says_what_each_layer_is(saved):
    record = index_of(saved)["tensors"]["body.0.weight"]
    assert record["scheme"] == ao.parse_scheme(SCHEME).to_dict()
    assert record["attributes"] == {"group_size": -1}
    assert (record["distribution"], record["distribution_version"]) == ("ao-quant", ao.__version__)
    assert record["file"] in shard_files(saved)
    assert index_of(saved)["plan"]["layers"]["body.0"]["scheme"] == SCHEME
    assert index_of(saved)["plan"]["layers"]["head"]["scheme"] is None


def test_shards_hold_whole_layers_within_the_limit(saved):
    """Several files, each tensor once; what belongs to a layer lies together."""
    files = shard_files(saved)
    assert len(files) > 2
    assert all(name.endswith(f"-of-{len(files):05d}.safetensors") for name in files)
    owners: dict[str, set[str]] = {}
    for name in files:
        with safe_open(saved / name, framework="pt") as shard:
            sizes = {}
            for key in shard.keys():  # noqa: SIM118 - not a dict
                layer = key.partition(":")[0]
                owners.setdefault(layer, set()).add(name)
                sizes[layer] = sizes.get(layer, 0) + shard.get_tensor(key).nbytes
            assert sum(sizes.values()) <= 9000 or len(sizes) == 1
    assert all(len(where) == 1 for where in owners.values())
    assert owners.keys() == index_of(saved)["tensors"].keys()
    assert_same(make(), ao.load(saved, model=Net))


def test_one_shard_by_default(tmp_path):
    ao.save(make(), tmp_path / "saved")
    (name,) = shard_files(tmp_path / "saved")
    assert name.endswith("-00001-of-00001.safetensors")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {name, "ao.json"}


@pytest.mark.parametrize("where", [0, 0.5, 0.999999])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_a_shard(saved, where, bit):
    name = shard_files(saved)[1]
    content = bytearray((saved / name).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (saved / name).write_bytes(content)
    with pytest.raises(ao.CheckpointError, match=f"{name} is corrupt: its SHA-256"):
        ao.load(saved, model=Net)


def test_a_flipped_bit_in_the_index(saved):
    """Every 31st byte, a bit each: never another model."""
    content, net = (saved / "ao.json").read_bytes(), make()
    for place in range(0, len(content), 31):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (saved / "ao.json").write_bytes(changed)
        try:
            again = ao.load(saved, model=Net)
        except ao.CheckpointError as error:
            named = str(error)
        else:  # a change of white space
            assert_same(net, again)
            continue
        assert "ao.json" in named or "checkpoint format" in named


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 1), "is truncated: .* bytes of"),
        (lambda file: file.write_bytes(b""), "is truncated: 0 bytes of"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "bytes and should have"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_shard_is_named(saved, damage, words, verify):
    """Sizes are looked at even without checksums."""
    name = shard_files(saved)[-1]
    damage(saved / name)
    with pytest.raises(ao.CheckpointError, match=f"{name} .*{words}|{name} {words}"):
        ao.load(saved, model=Net, verify=verify)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "ao.json is corrupt"),
        ("[]", "ao.json is corrupt: not a JSON object"),
        ("\0", "ao.json is corrupt"),
        ('{"format": 1}', "ao.json is corrupt: .*SHA-256"),
        ('{"format": 99}', "checkpoint format 99, and this ao-core reads 1"),
        ("{}", "checkpoint format None"),
    ],
)
def test_a_corrupt_index_is_named(saved, text, words):
    (saved / "ao.json").write_text(text)
    with pytest.raises(ao.CheckpointError, match=words):
        ao.load(saved, model=Net)


def test_a_directory_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ao.CheckpointError, match="does not exist"):
        ao.load(tmp_path / "absent")
    with pytest.raises(ao.CheckpointError, match=r"it holds no ao\.json"):
        ao.load(tmp_path)


def test_a_scheme_that_is_not_installed_names_the_distribution(saved, monkeypatch):
    monkeypatch.setenv("AO_DISABLE_PLUGINS", "quant")
    plugins.reset()
    try:
        words = f"needs scheme '{SCHEME}' version 1.*pip install ao-quant=={ao.__version__}"
        with pytest.raises(ao.CheckpointError, match=words):
            ao.load(saved, model=Net)
    finally:
        monkeypatch.undo()
        plugins.reset()
    assert_same(make(), ao.load(saved, model=Net))


def with_layers(**changes):
    def build():
        net = Net()
        for name, module in changes.items():
            net.add_module(name, module()) if module else delattr(net, name)
        return net

    return build


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (
            with_layers(extra=lambda: nn.Linear(2, 2)),
            r"does not fit Net: it lacks \['extra.bias', 'extra.weight'\]",
        ),
        (with_layers(norm=None), r"lacks nothing and holds \['norm.bias'.*does not have"),
        (with_layers(embed=lambda: nn.Embedding(33, 99)), r"'embed.weight' is \(33, 100\).*\(33, 99\)"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: Net().to("cpu"), "must not move them"),
        (lambda: 3, "must return an nn.Module, and returned int"),
        (None, r"holds a .*Net, which ao can't build by itself.*model="),
    ],
)
def test_a_wrong_factory(saved, factory, words):
    with pytest.raises(ao.CheckpointError, match=words):
        ao.load(saved, model=factory)


def test_a_module_is_no_factory(saved):
    with pytest.raises(
        ao.CheckpointError, match="takes a function that builds the model, and was given a module"
    ):
        ao.load(saved, model=Net())


def test_building_is_undone_when_it_fails(saved):
    """Modules made afterwards have storage again."""
    with pytest.raises(ao.CheckpointError):
        ao.load(saved, model=lambda: 1 / 0)
    assert nn.Linear(2, 2).weight.device.type == "cpu"


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
import test_checkpoint

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
ao.save(test_checkpoint.make(1), path, shard_bytes=9000)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize(
    ("moment", "survivor"),
    [("first shard", 0), ("second shard", 0), ("before the index", 0), ("before the old shards go", 1)],
)
def test_kill_while_overwriting(saved, run_python, moment, survivor):
    """The old checkpoint or the new one, bit for bit; the next save tidies up."""
    done = run_python(KILLED, moment, str(saved), str(Path(__file__).parent))
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
    done = run_python(KILLED, moment, str(path), str(Path(__file__).parent))
    assert done.returncode == -9, done.stderr
    with pytest.raises(ao.CheckpointError, match=r"holds no ao\.json"):
        ao.load(path, model=Net)
    ao.save(make(2), path)
    assert_same(make(2), ao.load(path, model=Net))
    assert len(list(path.iterdir())) == 2, "leftovers of the killed save"
