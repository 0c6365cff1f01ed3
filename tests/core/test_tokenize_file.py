"""A text file as token ids."""

from __future__ import annotations

import logging

import pytest
import torch
from letter_tokenizer import make_tokenizer

from ao_core.errors import ModelError, OptionError
from ao_core.models import tokenize_file

pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")


def test_tokens_of_a_file(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    path = tmp_path / "text.txt"
    path.write_text("a b c 0 ? z", encoding="utf-8")
    tokens = tokenize_file(path, make_tokenizer())
    assert tokens.dtype is torch.int64
    assert tokens.tolist() == [1, 2, 3, 27, 0, 26]
    assert tokenize_file(str(path), make_tokenizer(), max_tokens=2).tolist() == [1, 2]
    assert tokenize_file(path, make_tokenizer(), max_tokens=99).tolist() == tokens.tolist()
    assert not caplog.records  # the model reads 4 tokens at most, and that is no news


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b", encoding="utf-8-sig")
    assert tokenize_file(path, make_tokenizer()).tolist() == [1, 2]


def test_special_tokens_are_left_out(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    template = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("a")["input_ids"] == [0, 1]
    (tmp_path / "text.txt").write_text("a b", encoding="utf-8")
    assert tokenize_file(tmp_path / "text.txt", tokenizer).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "holds no text"),
        (b" \n\t", "holds no text"),
        (b"caf\xe9 au lait", "no UTF-8 text .* at byte 3"),
    ],
)
def test_text_that_can_not_be_read(tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        tokenize_file(path, make_tokenizer())


def test_other_misuse_of_tokenize_file(tmp_path):
    (tmp_path / "text.txt").write_text("a b")
    with pytest.raises(ModelError, match="is a directory"):
        tokenize_file(tmp_path, make_tokenizer())
    with pytest.raises(ModelError, match="without a tokenizer"):
        tokenize_file(tmp_path / "text.txt", None)
    with pytest.raises(OptionError, match="1 or more, found 0"):
        tokenize_file(tmp_path / "text.txt", make_tokenizer(), max_tokens=0)
