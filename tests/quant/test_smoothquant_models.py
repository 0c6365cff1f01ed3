"""SmoothQuant on models of transformers: a Llama, a Mixtral, a BERT."""

from __future__ import annotations

import copy

import pytest
import torch
from smoothed_models import EXPLICIT, FOLDED, SCHEME, smoothed

import ao_core as ao


def llama(**options):
    transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=36,
        intermediate_size=63,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **options,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data *= torch.exp(torch.randn(parameter.shape)) if "norm" in name else 3
    return model


@pytest.mark.parametrize(
    ("heads", "o_proj"), [(2, EXPLICIT), (6, f"{FOLDED}model.layers.0.self_attn.v_proj")]
)
def test_a_language_model(tmp_path, heads, o_proj):
    """Folds of a Llama: with grouped heads v's rows can't take o's factors. Saving keeps every bit."""
    model = llama(num_key_value_heads=heads)
    data = [torch.randint(0, 99, (2, 17)), torch.randint(0, 99, (1, 33))]
    plain, reference = copy.deepcopy(model), model(data[0]).logits.detach()
    _, where = smoothed(model, data, alpha=0.5)
    layer = "model.layers.0"
    assert {where[f"{layer}.self_attn.{n}_proj"] for n in "qkv"} == {f"{FOLDED}{layer}.input_layernorm"}
    assert where[f"{layer}.self_attn.o_proj"] == o_proj
    assert {where[f"{layer}.mlp.{n}_proj"] for n in ("gate", "up")} == {
        f"{FOLDED}{layer}.post_attention_layernorm"
    }
    assert where[f"{layer}.mlp.down_proj"] == f"{FOLDED}{layer}.mlp.up_proj"
    assert where["lm_head"] == f"{FOLDED}model.norm"
    ao.quantize_(plain, SCHEME)
    error = ao.sqnr(reference, model(data[0]).logits)
    assert error > 20 and error > ao.sqnr(reference, plain(data[0]).logits)

    ao.save(model, tmp_path / "saved")
    again = ao.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(data[0]).logits, model(data[0]).logits)


def test_experts_and_an_encoder(tmp_path):
    """A stack of experts is quantized unsmoothed, with the reason; a BERT has no norm to fold into."""
    transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = transformers.MixtralConfig(
        vocab_size=99, num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64, **sizes
    )
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    data = [torch.randint(0, 99, (2, 17))]
    reference = model(data[0]).logits.detach()
    report, where = smoothed(model, data, alpha=0.5)
    assert where["model.layers.0.mlp.experts.down_proj"].startswith("the experts of a stack share")
    assert report.converted["model.layers.0.mlp.experts.down_proj"] == SCHEME
    assert ao.sqnr(reference, model(data[0]).logits) > 20

    model = transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes)).eval()
    reference = model(data[0]).last_hidden_state.detach()
    _, where = smoothed(model, data, alpha=0.5)
    assert where["encoder.layer.0.attention.self.query"] == EXPLICIT
    assert where["encoder.layer.0.intermediate.dense"] == EXPLICIT
    assert ao.sqnr(reference, model(data[0]).last_hidden_state) > 20
    ao.save(model, tmp_path / "saved")
    again = ao.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(data[0]).last_hidden_state, model(data[0]).last_hidden_state)
