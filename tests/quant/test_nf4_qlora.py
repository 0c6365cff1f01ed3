"""Training adapters beside nf4 weights, and the page about it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import ao_core as ao

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "qlora.md"
SIZES = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 2}


def blocks():
    """Language, words after it, and text of each fenced block of the page."""
    found = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, words.split(), code) for language, words, code in found]


def files():
    return {
        word.removeprefix("file="): code for _, words, code in blocks() for word in words if "file=" in word
    }


@pytest.fixture(scope="module")
def lora():
    """The module lora.py of the page."""
    namespace = {"__name__": "lora"}
    exec(compile(files()["lora.py"], "lora.py", "exec"), namespace)
    return namespace


def tiny_llama():
    transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=96, tie_word_embeddings=True, initializer_range=0.2, **SIZES)
    return transformers.LlamaForCausalLM(config)


def bytes_of(model):
    """What every quantized weight stores, bit for bit."""
    return {
        (name, key): stored.clone().flatten().view(torch.uint8)
        for name, weight in model.named_parameters()
        if isinstance(weight, ao.QuantizedTensor)
        for key, stored in weight.stored().items()
    }


def train(model, batches, rate):
    """The loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def assert_same_bytes(model, before):
    after = bytes_of(model)
    assert before and after.keys() == before.keys()
    for name, stored in before.items():
        assert torch.equal(after[name], stored), f"{name} changed"


def test_adapters_learn_and_the_base_stays(lora):
    model = tiny_llama()
    report = ao.quantize_(model, "nf4")
    lora["add_adapters"](model, rank=4)
    before = bytes_of(model)
    ids = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(1))
    losses = train(model, [ids] * 60, rate=2e-2)
    assert losses[-1] < 0.6 * losses[0], losses[::10]
    assert_same_bytes(model, before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(report.converted)


def test_gradients_are_those_beside_the_dequantized_weights(lora):
    """In float64, for every adapter of a model with two layers."""
    model = tiny_llama()
    ao.quantize_(model, "nf4")
    lora["add_adapters"](model, rank=4)
    ids = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    expected = tiny_llama()
    lora["add_adapters"](expected)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, lora["Lora"]):
            base = nn.Linear(layer.base.in_features, layer.base.out_features, bias=False)
            base.weight = nn.Parameter(layer.base.weight.dequantize(), requires_grad=False)
            copy = lora["Lora"](base, 4, 16)
            copy.load_state_dict({"down": layer.down, "up": layer.up}, strict=False)
            expected.set_submodule(name, copy)
    expected = expected.double()
    for network in (model, expected):
        network(input_ids=ids, labels=ids).loss.backward()
    wide = dict(expected.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), wide[name].grad, rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared == 28


def test_activations_can_be_recomputed(lora):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(100, 17), nn.Tanh())
    ao.quantize_(layer, "nf4")
    layer.set_submodule("0", lora["Lora"](layer[0], 4, 16))
    x = torch.randn(5, 100, requires_grad=True)
    layer(x).sum().backward()
    expected = x.grad.clone(), layer[0].up.grad.clone()
    x.grad = layer[0].up.grad = None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(layer[0].up.grad, expected[1])


@pytest.mark.slow
def test_smollm2_learns_a_little_text(lora):
    """50 steps of 96 tokens, on eight such texts in turn, with adapters in the last six of 30 blocks."""
    spec = importlib.util.spec_from_file_location("ao_demo_data", ROOT / "examples" / "demo" / "data.py")
    data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)
    try:
        loaded = ao.load_model(data.smollm2_gguf())
        text = data.wiki_text("calibration")[:20_000]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    batches = torch.tensor(loaded.tokenizer(text)["input_ids"][: 8 * 96]).view(8, 2, 48)
    model = loaded.model.requires_grad_(requires_grad=False)
    ao.quantize_(model, "nf4")
    torch.manual_seed(0)
    lora["add_adapters"](model.model.layers[-6:])
    before = bytes_of(model)
    assert len({name for name, _ in before}) == 210
    losses = train(model, [batches[step % 8] for step in range(50)], rate=2e-3)
    assert sum(losses[-8:]) / 8 < sum(losses[:8]) / 8 - 0.5, losses
    assert_same_bytes(model, before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the page is followed: its files, and MODEL."""
    tiny_llama().save_pretrained(tmp_path / "MODEL")
    for name, code in files().items():
        (tmp_path / name).write_text(code, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("lora", None)


def test_the_blocks_of_the_page_run(folder):
    namespace = {"__name__": "page"}
    run = [code for language, words, code in blocks() if language == "python" and not words]
    assert len(run) == 3
    for code in run:
        exec(compile(code, str(PAGE), "exec"), namespace)
    names = [name for name, _ in namespace["model"].named_parameters()]
    assert names == [name for name, _ in tiny_llama().named_parameters()], "merged"
    saved = torch.load(folder / "adapters.pt")
    assert len(saved) == 28 and all(saved[name].any() for name in saved)


def test_the_block_about_peft_runs(folder):
    pytest.importorskip("peft")
    ((_, _, code),) = [block for block in blocks() if block[1] == ["peft"]]
    namespace = {"ao": ao, "ids": torch.randint(0, 96, (2, 16))}
    exec(compile(code, str(PAGE), "exec"), namespace)
    parameters = dict(namespace["model"].named_parameters())
    assert any(isinstance(weight, ao.QuantizedTensor) for weight in parameters.values())
    assert sum(weight.grad is not None and bool(weight.grad.any()) for weight in parameters.values()) == 4


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_the_script_of_the_page_trains_on_two_ranks(folder):
    ((_, _, line),) = [block for block in blocks() if block[0] == "sh"]
    program, *words = line.split()
    assert program == "torchrun"
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if torch.cuda.device_count() < 2:
        settings["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    done = subprocess.run(
        command, env=settings, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    saved = torch.load(folder / "adapters.pt")
    assert len(saved) == 28 and all(saved[name].any() for name in saved)
