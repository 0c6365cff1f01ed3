"""Saving and loading: bit for bit, whole or not at all, and never through the float model."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_nets import SCHEME, Net, assert_same, make, shard_files
from safetensors import safe_open
from torch import nn

import ao_core as ao

pytestmark = pytest.mark.usefixtures("plain_environment")


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
