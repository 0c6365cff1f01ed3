"""Calibration data: text, data sets, tokenizers, and a model's own inputs."""

from __future__ import annotations

import io
import sys
import types

import pytest
import torch
from small_models import data, model_of
from torch import nn

import ao_core as ao
from ao_core.calibrate import SentencePiece, read_texts, tokenized
from ao_gptq import InputRecorder

WORDS = [f"word{number} stands beside word{number + 1}." for number in range(200)]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model of 120 pieces, trained here."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    made = io.BytesIO()
    trainer.train(
        sentence_iterator=iter(WORDS), model_writer=made, vocab_size=60, pad_id=3, hard_vocab_limit=False
    )
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(made.getvalue())
    return path


class Letters:
    """A tokenizer of letters, without a padding token."""

    eos_token_id = 1

    def __call__(self, text, *, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) % 50 for letter in text]}


def test_sentencepiece_reads_as_its_own_processor_does(pieces):
    import sentencepiece

    found = SentencePiece(pieces)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    assert found("word7 stands")["input_ids"] == [processor.bos_id(), *processor.encode("word7 stands")]
    assert found("word7", add_special_tokens=False)["input_ids"] == processor.encode("word7")
    assert len(found) == processor.get_piece_size() and found.pad_token_id == 3
    packed = tokenized(WORDS, found, samples=3, context=17)
    ids = processor.encode("\n\n".join(WORDS))
    assert [batch.shape for batch in packed] == [(1, 17)] * 3
    assert torch.cat(packed, 1).flatten().tolist() == ids[:51]


def test_packed_and_padded():
    packed = tokenized(["abc", " ", "defg"], Letters(), samples=2, context=4)
    ids = Letters()("abc\n\ndefg", add_special_tokens=False)["input_ids"]
    assert torch.cat(packed, 1).flatten().tolist() == ids[:8]
    padded = tokenized(["abc", "", "defghi"], Letters(), samples=5, context=5, packed=False)
    assert [batch["attention_mask"].tolist() for batch in padded] == [[[1, 1, 1, 1, 0]], [[1] * 5]]
    assert padded[0]["input_ids"][0, 4] == 1 and padded[1]["input_ids"].shape == (1, 5)


def test_texts_of_files_and_data_sets(tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("one\n\ntwo", encoding="utf-8")
    assert read_texts(file) == ["one\n\ntwo"]

    class Rows:
        column_names = ("text", "label")

        def __getitem__(self, column):
            return {"text": ["one", "", "two"], "label": [1, 2, 3]}[column]

    rows, asked = Rows(), []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, split: asked.append((name, split)) or rows
    fake.load_from_disk = lambda path: asked.append(path) or {"train": rows, "test": None}
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_texts("datasets:owner/name") == read_texts("datasets:owner/name:test") == ["one", "two"]
    assert read_texts(tmp_path) == ["one", "two"]
    assert asked == [("owner/name", "train"), ("owner/name", "test"), str(tmp_path)]
    with pytest.raises(ao.ModelError, match="has no column 'body'; it has text, label"):
        read_texts(tmp_path, column="body")
    with pytest.raises(ao.ModelError, match=r"column 'label' of .* holds no text"):
        read_texts(tmp_path, column="label")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: read_texts(path / "none.txt"), "there is no text file"),
        (lambda path: tokenized([" ", ""], Letters(), source="FILE"), "FILE holds no text to calibrate on"),
        (
            lambda path: tokenized(["ab"], Letters(), context=64),
            "2 tokens, fewer than one window of 64",
        ),
        (lambda path: tokenized(["a"], None), "without a tokenizer"),
        (lambda path: SentencePiece(path / "none.model"), "no SentencePiece model .*none.model"),
    ],
)
def test_what_can_not_be_calibrated_on(call, words, tmp_path):
    with pytest.raises(ao.ModelError, match=words):
        call(tmp_path)


def test_a_file_that_is_no_sentencepiece_model(tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "broken.model").write_bytes(b"nothing of the kind")
    with pytest.raises(ao.ModelError, match=r"broken.model is no SentencePiece model"):
        SentencePiece(tmp_path / "broken.model")


def test_padding_has_no_say():
    """Codes of padded batches are those of the tokens alone."""

    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.linear = nn.Embedding(50, 64), nn.Linear(64, 17)

        def forward(self, input_ids, attention_mask=None):
            return self.linear(self.embed(input_ids))

    texts = [f"{word} and more of it" for word in WORDS[:20]]
    padded = tokenized(texts, Letters(), context=80, packed=False)
    alone = [batch["input_ids"][:, : int(batch["attention_mask"].sum())] for batch in padded]
    models = [Embedded().eval() for _ in range(2)]
    for model, batches in zip(models, (padded, alone), strict=True):
        report = ao.compress_(model, "gptq", batches, scheme="int4-weight-only:group_size=32")
        assert report.notes["linear"]["tokens"] == sum(batch.numel() for batch in alone)
    assert torch.equal(models[0].linear.weight.dequantize(), models[1].linear.weight.dequantize())


def test_a_models_own_inputs_are_recorded():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model_of(2)

        def forward(self, x, factor=None, *, use_cache=None):
            return self.body(x if factor is None else x * factor["by"])

    model, batches = Two().eval(), data()
    with InputRecorder(model, limit=2) as recorder:
        expected = [model(batches[0]), model(batches[1], factor={"by": torch.tensor(2.0)}), model(batches[2])]
    assert len(recorder.batches) == 2 and recorder.missed == 1
    batches[0].zero_()
    first, second = recorder.batches
    torch.testing.assert_close(model(**first) if isinstance(first, dict) else model(*first), expected[0])
    torch.testing.assert_close(model(**second), expected[1])
    model(batches[0])
    assert len(recorder.batches) == 2  # the block has ended
    report = ao.compress_(model, "gptq", recorder.batches, scheme="int8-weight-only")
    assert all(facts["tokens"] == 800 for facts in report.notes.values())
    with pytest.raises(ao.OptionError, match="limit must be 1 or more"):
        InputRecorder(model, limit=0)
