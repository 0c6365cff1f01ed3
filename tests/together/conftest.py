"""The command line in this process, and a tiny language model for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ao_core as ao
from ao_core.cli import main

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class Done:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys):
    """Run a command line in this process."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(ended.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """A tiny model that transformers saved, the same quantized, and texts."""
    transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("models")
    words = ["<unk>", *LETTERS]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=36,
        intermediate_size=63,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(root / "model")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    tokenizer.save_pretrained(root / "model")
    letters = torch.randint(0, 26, (300,), generator=torch.Generator().manual_seed(1))
    (root / "text.txt").write_text(" ".join(LETTERS[i] for i in letters))
    (root / "short.txt").write_text("a b c")
    (root / "blank.txt").write_text(" \n")
    (root / "empty").mkdir()
    ao.quantize_(model, "int8-weight-only")
    ao.save(model, root / "quantized", tokenizer=tokenizer)
    return SimpleNamespace(
        root=root,
        model=root / "model",
        quantized=root / "quantized",
        text=root / "text.txt",
        short=root / "short.txt",
        empty=root / "empty",
        ids=letters + 1,
        tokenizer=tokenizer,
    )


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"
