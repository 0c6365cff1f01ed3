"""What is damaged, missing or does not fit is named, and nothing is loaded."""

from __future__ import annotations

import os

import pytest
from checkpoint_nets import SCHEME, Net, assert_same, make, shard_files
from torch import nn

import ao_core as ao
from ao_core import plugins

pytestmark = pytest.mark.usefixtures("plain_environment")


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
