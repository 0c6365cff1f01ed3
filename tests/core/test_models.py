"""Loading models, on tiny ones made here."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from letter_tokenizer import WORDS, make_tokenizer

from ao_core.errors import ModelError
from ao_core.models import load_model

transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
huggingface_hub = pytest.importorskip("huggingface_hub")


def make_model(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "model"
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def gguf_file(tmp_path):
    """The tiny model as a GGUF file, with a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf", reason="needs the extra ao-core[hf]")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files through accelerate")
    path = tmp_path / "ggufs" / "tiny.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    model = make_model().model
    tensors = {
        "token_embd.weight": model.embed_tokens.weight,
        "output_norm.weight": model.norm.weight,
    }
    for i, layer in enumerate(model.layers):
        for ours, theirs in names.items():
            tensors[f"blk.{i}.{theirs}.weight"] = layer.get_submodule(ours).weight
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_hugging_face_directory(directory):
    loaded = load_model(directory)
    assert loaded.kind == "huggingface"
    assert loaded.source == str(directory)
    assert not loaded.model.training
    assert loaded.tokenizer("a b")["input_ids"] == [1, 2]
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded.model(ids).logits, make_model()(ids).logits, rtol=0, atol=0)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_the_dtype_is_the_checkpoints_unless_asked_for(tmp_path):
    make_model().bfloat16().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.model.dtype is torch.bfloat16
    assert loaded.tokenizer is None
    assert load_model(tmp_path, dtype=torch.float32).model.dtype is torch.float32


def test_an_encoder_loads_as_what_it_is(tmp_path):
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    assert type(load_model(tmp_path).model) is transformers.BertModel


def test_a_gguf_file_becomes_plain_float32(gguf_file, tmp_path):
    loaded = load_model(gguf_file)
    assert loaded.kind == "gguf"
    assert loaded.source == str(gguf_file)
    assert loaded.model.dtype is torch.float32
    assert loaded.tokenizer is not None
    assert getattr(loaded.model.config, "quantization_config", None) is None
    reference = make_model()
    expected = reference.model.layers[1].mlp.down_proj.weight
    assert torch.equal(loaded.model.model.layers[1].mlp.down_proj.weight, expected)
    loaded.model.save_pretrained(tmp_path / "copy")
    again = load_model(tmp_path / "copy").model
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, loaded.model(ids).logits)


def test_a_transformers_that_leaves_its_gguf_marker_behind(gguf_file, monkeypatch):
    load = transformers.AutoModelForCausalLM.from_pretrained

    def older(*args, quantization_config=None, **kwargs):
        model, info = load(*args, **kwargs)
        model.config.quantization_config = {"quant_method": "gguf"}
        return model, info

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", older)
    assert getattr(load_model(gguf_file).model.config, "quantization_config", None) is None


def test_a_directory_with_one_gguf_file_counts_as_that_file(gguf_file):
    loaded = load_model(gguf_file.parent, dtype=torch.bfloat16)
    assert (loaded.kind, loaded.source) == ("gguf", str(gguf_file))
    assert loaded.model.dtype is torch.bfloat16
    (gguf_file.parent / "second.GGUF").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"2 GGUF files \(second.GGUF, tiny.gguf\)"):
        load_model(gguf_file.parent)


def test_a_leftover_gguf_marker_does_not_spoil_a_directory(directory):
    text = (directory / "config.json").read_text()
    marked = text.replace("{", '{"quantization_config": {"quant_method": "gguf"},', 1)
    (directory / "config.json").write_text(marked)
    model = load_model(directory).model
    assert getattr(model.config, "quantization_config", None) is None
    assert getattr(model, "hf_quantizer", None) is None


def test_a_directory_saved_by_ao(tmp_path):
    from ao_core.checkpoint import save

    model = make_model()
    save(model, tmp_path / "saved", tokenizer=make_tokenizer())
    loaded = load_model(tmp_path / "saved")
    assert loaded.kind == "ao"
    assert loaded.tokenizer("a b")["input_ids"] == [1, 2]
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert load_model(tmp_path / "saved", dtype=torch.bfloat16).model.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "name", ["no/such/model", "./nowhere", "/no/such/model", "two words", "gone.gguf", "", "a//b"]
)
def test_what_is_neither_a_path_nor_a_hub_id(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(ModelError, match=r"does not exist.*hub id"):
            load_model(name)
    else:
        with pytest.raises(ModelError, match="no model directory: it holds nothing"):
            load_model(name)  # the working directory


def test_a_path_object_is_never_a_hub_id():
    with pytest.raises(ModelError, match="does not exist"):
        load_model(Path("owner/name"))


@pytest.mark.parametrize("files", [[], ["notes.txt", "weights.bin"]])
def test_a_directory_that_is_no_model(tmp_path, files):
    for name in files:
        (tmp_path / name).touch()
    found = ", ".join(files) or "nothing"
    with pytest.raises(ModelError, match=f"it holds {found}; needed is config.json .*ao.json"):
        load_model(tmp_path)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ModelError, match="no GGUF; pass the directory"):
        load_model(tmp_path / "model.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"<html>")
    with pytest.raises(ModelError, match=r"damaged.*b'<htm'"):
        load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("keep", [4, 100, 0.5, 0.99])
def test_a_gguf_that_is_cut_short(gguf_file, keep):
    data = gguf_file.read_bytes()
    gguf_file.write_bytes(data[: keep if keep > 1 else int(len(data) * keep)])
    with pytest.raises(ModelError, match=r"tiny\.gguf can't be read .*damaged"):
        load_model(gguf_file)


def test_missing_weights_are_never_made_up(directory):
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 .*model.layers.1.mlp.up_proj.weight"):
        load_model(directory)


def test_a_weight_of_another_shape_is_named(directory):
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight of .* is \(3, 5\), and \("):
        load_model(directory)


def test_a_damaged_tokenizer_is_named(directory):
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer in .* can't be loaded .*check its files"):
        load_model(directory)


def test_a_damaged_directory(directory):
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or cut short .*again"):
        load_model(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="can't be loaded"):
        load_model(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match="can't be loaded"):
        load_model(directory)


def test_code_in_a_checkpoint_is_refused(directory):
    text = (directory / "config.json").read_text().replace('"llama"', '"mine"')
    code = '{"auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},'
    (directory / "config.json").write_text(text.replace("{", code, 1))
    (directory / "mine.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ModelError, match="can't be loaded"):
        load_model(directory)


def test_the_hub_is_unreachable(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"owner/name here, and the hub can't be reached.*local"):
        load_model("owner/name")


def test_the_hub_has_no_such_model(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("owner/name is not a valid model identifier\nmore lines")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"neither a directory here nor .*identifier\)$"):
        load_model("owner/name")


def test_transformers_is_missing(monkeypatch, directory):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r'pip install "ao-core\[hf\]"'):
        load_model(directory)


def test_a_package_that_transformers_needs_is_missing(monkeypatch, directory):
    def refuse(*args, **kwargs):
        raise ImportError("please install gguf")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"please install gguf\); pip install"):
        load_model(directory)


def test_importing_the_module_imports_no_transformers():
    code = "import ao_core.models, sys; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("fails", [False, True])
def test_loading_is_silent_and_puts_the_settings_back(directory, gguf_file, capfd, fails, request):
    log = transformers.utils.logging
    hub_log = huggingface_hub.logging
    for settings in (log, hub_log):
        request.addfinalizer(partial(settings.set_verbosity, settings.get_verbosity()))
        settings.set_verbosity_info()
    before = log.get_verbosity(), log.is_progress_bar_enabled(), hub_log.get_verbosity()
    assert before[1]
    if fails:
        gguf_file.write_bytes(gguf_file.read_bytes()[:200])
        with pytest.raises(ModelError):
            load_model(gguf_file)
    else:
        load_model(gguf_file)
        load_model(directory)
    assert capfd.readouterr() == ("", "")
    after = log.get_verbosity(), log.is_progress_bar_enabled(), hub_log.get_verbosity()
    assert after == before
