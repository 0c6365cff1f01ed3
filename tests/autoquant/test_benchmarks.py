"""The benchmark scripts and the demo's search run, small and on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ao_core as ao

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_vision_transformer(tmp_path):
    out = tmp_path / "vit.json"
    sizes = ("--layers", "1", "--hidden", "64", "--image", "32", "--batches", "1", "2")
    command = [sys.executable, str(BENCHMARKS / "autoquant_vit.py"), str(out), *sizes]
    done = subprocess.run(
        [*command, "--schemes", "int8-dynamic"], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text("utf-8"))
    assert list(data["batches"]) == ["1", "2"] and data["fingerprint"]["torch"] == torch.__version__
    linears = 64 * (3 + 1 + 4 + 4) * 64 + 1000 * 64
    others = 64 * 3 * 16 * 16 + 64 * (1 + 5) + 64 * (3 + 1 + 4 + 1) + 1000 + 64 * (1 + 6)
    for each in data["batches"].values():
        rows = each["rows"]
        assert sum(each["chosen"].values()) == 5 and set(each["chosen"]) <= {"float", "int8-dynamic"}
        assert rows["bfloat16"]["stored_bytes"] == 2 * (linears + others)
        scales = 4 * (64 * (3 + 1 + 4 + 1) + 1000)
        assert rows["int8-dynamic"]["stored_bytes"] == linears + scales + 2 * others
        assert all(row["ms"] > 0 for row in rows.values())
        assert each["predicted_us"]["plan"] <= each["predicted_us"]["bfloat16"]
        assert "patches" in each["reasons"]  # a convolution is not searched


def test_a_vision_transformer_that_does_not_fit_is_refused(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "autoquant_vit.py"), str(tmp_path / "f"), "--image", "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "768 and 100 were given" in done.stderr


def test_the_demos_search(monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
    monkeypatch.syspath_prepend(str(BENCHMARKS.parents[1] / "examples" / "demo"))
    import search

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=96, tie_word_embeddings=True, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    read = []
    monkeypatch.setattr(search, "wiki_text", lambda split: read.append(split) or "x" * 10**6)
    monkeypatch.setattr(search, "WINDOW", 16)
    ids = torch.randint(0, 96, (12 * 16 + 5,)).tolist()
    done = search.search_(model, lambda text, verbose: {"input_ids": ids}, max_error=0.05)
    check = done.plan.evidence["check"]
    assert read == ["calibration"]  # the evaluation text is not looked at
    assert check["loss"]["rows"] == 8 * 16 and check["loss"]["nll"] <= 0.05
    linears = {name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    assert set(done.chosen) == linears - {"lm_head"}  # it is tied to the embedding
    assert set(done.chosen.values()) <= {*map(str, map(ao.parse_scheme, search.SCHEMES)), "float"}
    for name, scheme in done.chosen.items():
        weight = model.get_submodule(name).weight
        assert getattr(weight, "scheme", "float") == scheme
    assert "float" not in done.chosen.values()
