"""Transformers models: ``ao.load(directory)`` alone gives a model that works and generates."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

import ao_core as ao
from ao_core.models import load_model

transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
SCHEME = "int8-weight-only"
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "the", "cat", "sat"]
TEXT = "the cat sat a b z"


def make_model(*, tied=True, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=36,
        intermediate_size=63,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=1234.5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config.repetition_penalty = 1.25
    return model


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_alone_works(tmp_path, tied, dtype):
    """Same logits to the last bit, same text, same ties, same rotary frequencies."""
    model, tokenizer = make_model(tied=tied, dtype=dtype), make_tokenizer()
    report = ao.quantize_(model, SCHEME)
    assert ("lm_head" in report.converted) == (not tied)
    ao.save(model, tmp_path / "saved", tokenizer=tokenizer, shard_bytes=5000)
    again = ao.load(tmp_path / "saved")

    assert type(again) is type(model)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert again.generation_config.repetition_penalty == 1.25
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.dtype == dtype
    for name, buffer in model.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer), name
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    assert torch.equal(logits(again, ids), logits(model, ids))
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))


def test_config_and_tokenizer_travel(tmp_path):
    """The directory is enough for transformers' own loaders and for ours."""
    ao.save(make_model(), tmp_path / "saved", tokenizer=make_tokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer(TEXT)["input_ids"] == make_tokenizer()(TEXT)["input_ids"]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").rope_parameters["rope_theta"] == 1234.5
    loaded = load_model(tmp_path / "saved")
    assert loaded.kind == "ao"
    assert loaded.tokenizer.decode(loaded.tokenizer("cat")["input_ids"]) == "cat"


def test_the_tokenizer_is_found_where_the_model_came_from(tmp_path):
    source = tmp_path / "source"
    make_model().save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    model = load_model(source).model
    ao.quantize_(model, SCHEME)
    ao.save(model, tmp_path / "saved")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")("cat")["input_ids"] == [30]


def test_a_missing_tokenizer_is_said_and_not_fatal(tmp_path, caplog):
    ao.save(make_model(), tmp_path / "saved")
    assert "no tokenizer was found" in caplog.text
    assert load_model(tmp_path / "saved").tokenizer is None


def test_saving_again_replaces_the_companions(tmp_path):
    ao.save(make_model(), tmp_path / "saved", tokenizer=make_tokenizer())
    first = {file.name for file in (tmp_path / "saved").iterdir() if file.suffix == ".json"}
    model = make_model(tied=False)
    ao.quantize_(model, SCHEME)
    ao.save(model, tmp_path / "saved", tokenizer=make_tokenizer())
    assert {file.name for file in (tmp_path / "saved").iterdir() if file.suffix == ".json"} == first
    config = json.loads((tmp_path / "saved" / "config.json").read_text("utf-8"))
    assert config["tie_word_embeddings"] is False
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(logits(ao.load(tmp_path / "saved"), ids), logits(model, ids))


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_disk_that_is_full_before_the_index(tmp_path, monkeypatch, overwrite):
    """The config and the tokenizer are those of before too; another attempt is not refused."""
    path = tmp_path / "saved"
    if overwrite:
        ao.save(make_model(), path, tokenizer=make_tokenizer())
        before = {file.name: file.read_bytes() for file in path.iterdir()}
    write = Path.write_text

    def fail(file, text, **options):
        if file.name == "ao.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, text, **options)

    other = make_model(tied=False)
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", fail)
        with pytest.raises(ao.CheckpointError, match="No space left"):
            ao.save(other, path)
    if overwrite:
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    else:
        assert not path.exists()
    ao.save(other, path)


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_companion_is_named(tmp_path, caplog, damage):
    """As a warning: the model does not depend on it, and somebody may have edited it."""
    ao.save(make_model(), tmp_path / "saved", tokenizer=make_tokenizer())
    ao.load(tmp_path / "saved")
    assert caplog.text == ""
    file = tmp_path / "saved" / "tokenizer.json"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content) if damage == "flip" else file.unlink()
    ao.load(tmp_path / "saved")
    (record,) = caplog.records
    assert f"{file} is not as it was saved" in record.getMessage()


def test_a_class_that_transformers_lacks(tmp_path):
    """A subclass of one's own needs its factory."""

    class Mine(transformers.LlamaForCausalLM):
        pass

    model = Mine(make_model().config).eval()
    ao.save(model, tmp_path / "saved", tokenizer=make_tokenizer())
    with pytest.raises(ao.CheckpointError, match=r"has no Mine.*model=function"):
        ao.load(tmp_path / "saved")
    again = ao.load(tmp_path / "saved", model=lambda: Mine(make_model().config))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_a_tied_head_that_is_converted_comes_back_tied(tmp_path):
    """Embedding look-ups and the head go through one quantized weight."""
    model = make_model()
    ao.quantize_(model, SCHEME, include=["lm_head", "*_proj"])
    assert isinstance(model.model.embed_tokens.weight, ao.QuantizedTensor)
    ao.save(model, tmp_path / "saved", tokenizer=make_tokenizer())
    again = ao.load(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(logits(again, ids), logits(model, ids))
