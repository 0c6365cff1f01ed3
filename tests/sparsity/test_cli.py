"""``ao compress`` with algorithms that prune, and what ``ao eval`` says of the result."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from ao_core.cli import build
from ao_core.cli.compress import parse_algorithms
from ao_core.errors import OptionError

transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparse")
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "model")
    words = {f"w{index}": index for index in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root / "model")
    text = " ".join(f"w{(7 * i * i) % 64}" for i in range(600))
    (root / "text.txt").write_text(text, "utf-8")
    return root


def run(*arguments):
    return CliRunner().invoke(build(), [str(each) for each in arguments])


def test_compress_and_eval(places, tmp_path):
    done = run("compress", places / "model", "--algorithm", "wanda", "--pattern", "2:4", "--calibration",
               places / "text.txt", "--context", 64, "--scheme", "semi-sparse",
               "-o", tmp_path / "out", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert len(report["converted"]) == 14 and report["sparsity"] == 0.5
    assert report["converted_bytes_after"] < 0.6 * report["converted_bytes_before"]
    assert "saves bytes, not time" in next(iter(report["slower"].values()))
    seen = run("eval", tmp_path / "out", "--text", places / "text.txt", "--context", 64, "--stride", 64,
               "--no-speed", "--json")  # fmt: skip
    assert seen.exit_code == 0, seen.output
    found = json.loads(seen.stdout)
    assert found["sparsity"] == 0.5 and found["bytes"] == report["bytes_after"]
    shown = run("eval", tmp_path / "out", "--text", places / "text.txt", "--context", 64, "--stride", 64,
                "--no-speed")  # fmt: skip
    assert "zeros in linears" in shown.stdout and "50.0%" in shown.stdout


def test_a_share_and_what_is_printed(places, tmp_path):
    done = run("compress", places / "model", "--algorithm", "sparsegpt", "--sparsity", 0.25, "--calibration",
               places / "text.txt", "--context", 64, "-o", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "25.0% of the linears' weights are zero" in " ".join(done.stderr.split())


def test_options_go_to_the_algorithms_that_have_them():
    wanda, gptq = parse_algorithms(["wanda:per=layer", "gptq"], sparsity=0.3, pattern=None)
    assert (wanda.sparsity, wanda.per, gptq.percdamp) == (0.3, "layer", 0.01)
    with pytest.raises(OptionError, match="--pattern was given, and none of smoothquant, gptq has an option"):
        parse_algorithms(["smoothquant", "gptq"], sparsity=None, pattern="2:4")
    with pytest.raises(OptionError, match="1 <= n <= m"):
        parse_algorithms(["wanda"], sparsity=None, pattern="5:4")
