"""Quantized weights under FSDP2 and DTensor: two processes compute what one does.

The processes run ``tests/helpers/fsdp_ranks.py``: on CUDA devices with NCCL where there are two, else on the
CPU with gloo.
"""

from __future__ import annotations

import re
import subprocess
import sys

import fsdp_ranks
import pytest
import torch
import torch.distributed as dist
from fsdp_ranks import (
    RANKS,
    TRAINED,
    data,
    lora_model,
    odd_layers,
    run_odd_layers,
    train,
)

import ao_core as ao

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, fsdp_ranks.__file__]
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * RANKS, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_train_as_one_does(ranks, name):
    """Each has half of the batch; the loss is their mean, the adapters' gradients that of the whole batch."""
    model = lora_model(*TRAINED[name])
    weight = model[0].base.weight
    expected = train(model, data())
    assert expected[0][0] != expected[1][0], "the steps change nothing"
    for rank in ranks:
        found, kind, stored = rank["training"][name]
        for (loss, grads), (expected_loss, expected_grads) in zip(found, expected, strict=True):
            torch.testing.assert_close(loss, expected_loss)
            torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-7)
        whole_weight = weight.portable()
        assert kind == type(whole_weight).__name__
        for one, other in zip(stored, whole_weight.stored().values(), strict=True):
            assert one.dtype == other.dtype and one.float().equal(other.cpu().float()), "the base changed"


def test_embeddings_experts_and_wrapped_weights_are_sharded(ranks):
    expected = run_odd_layers(odd_layers())
    for rank in ranks:
        kinds, found = rank["odd layers"]
        assert kinds == ["Nf4Tensor", "Nf4Tensor", "ConvWeight", "InputScaledTensor"]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [32, 17])
@pytest.mark.parametrize("policy", ["kept", "offloaded", "bfloat16"])
def test_policies(ranks, policy, rows):
    model, x = lora_model("nf4", rows), data()
    if policy == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    expected = model(x).detach().cpu()
    for rank in ranks:
        for found in rank["policies"][policy, rows]:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [32, 17])
def test_the_whole_weight_is_freed_when_the_layer_has_run(ranks, rows):
    stored = ao.stored_bytes(lora_model("nf4", rows)[0].base.weight)
    for rank in ranks:
        assert rank["freeing"][rows] == ([stored], 0)


@pytest.mark.parametrize("way", ["copied", "assigned", "saved"])
def test_state_dicts_come_back(ranks, way):
    expected = lora_model("nf4", 17)(data()).detach().cpu()
    for rank in ranks:
        before, after = rank["state dicts"][way]
        assert not torch.allclose(before, expected, rtol=0.01), "there was nothing to load"
        torch.testing.assert_close(after, expected)


def test_a_full_state_dict_holds_whole_quantized_weights(ranks):
    quantized = {"0.base.weight", "2.base.weight"}
    for rank in ranks:
        kinds = rank["state dicts"]["full"]
        assert {key for key, kind in kinds.items() if kind == "Nf4Tensor"} == quantized
        assert {kinds[key] for key in kinds if key not in quantized} == {"Tensor"}


def test_dtensors_are_redistributed_and_multiplied(ranks):
    for index, rank in enumerate(ranks):
        found = rank["dtensors"]
        assert found["rows"] == ((9, 9), (8, 8))[index]
        assert torch.equal(*found["values"])
        torch.testing.assert_close(*found["columnwise"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("columns", r"TableTensor can't be cut along dimension 1.*dequantize"),
        ("no rows", r"LooseTensor can't be cut along dimension 0: 'table' is \(16,\)"),
        ("one piece", r"WholeTensor can't be cut along dimension 0.*ignored_params"),
        ("scattered", r"Nf4Tensor can't be sent.*src_data_rank=None"),
        ("broadcast", r"Nf4Tensor can't be sent.*src_data_rank=None"),
        ("replicas", r"can't be sent.*init_sync=False"),
    ],
)
def test_a_refusal_says_what_to_do(ranks, name, words):
    for rank in ranks:
        assert re.search(words, rank["refusals"][name])
