"""``ao compress`` on a real, tiny language model: what it saves, what it says, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import ao_core as ao
from ao_core.models import tokenize_file

transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
pytestmark = pytest.mark.usefixtures("plain_environment")

SCHEME = "int8-dynamic"
SMOOTH = ("--algorithm", "smoothquant", "--scheme", SCHEME)


def test_it_saves_what_compress_makes(run, places, tmp_path):
    """The first windows of the text, in order; the saved model is that of ``compress_``, to the last bit."""
    out = tmp_path / "out"
    text = ("--calibration", places.text, "--samples", 3, "--context", 32)
    done = run("compress", places.model, *SMOOTH, *text, "-o", out, "--exclude", "lm_head")
    assert done.code == 0, done.err
    assert "layers converted 14" in [" ".join(line.split()) for line in done.out.splitlines()]
    assert "calibrated 2 blocks of model.layers in turn on 3 windows of 32 tokens" in done.err
    model = transformers.LlamaForCausalLM.from_pretrained(places.model).eval()
    tokens = tokenize_file(places.text, places.tokenizer)
    batches = list(tokens[:96].view(3, 1, 32))
    ao.compress_(model, "smoothquant", batches, scheme=SCHEME, exclude="lm_head")
    saved = ao.load(out)
    with torch.no_grad():
        assert torch.equal(saved(tokens[None]).logits, model(tokens[None]).logits)


def test_json_is_the_report(run, places, tmp_path):
    text = ("--calibration", places.text, "--samples", 2, "--context", 16)
    done = run("compress", places.model, *SMOOTH, *text, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["algorithms"] == ["smoothquant"] and found["scheme"] == SCHEME
    assert (found["samples"], found["context"]) == (2, 16)
    assert found["converted"]["lm_head"] == SCHEME
    note = found["notes"]["model.layers.0.self_attn.q_proj"]
    assert note["tokens"] == 32
    assert note["smoothquant"] == "folded into model.layers.0.input_layernorm"
    assert "calibrating" in done.err


def test_fewer_windows_than_asked_for_is_said(run, places, tmp_path):
    text = ("--calibration", places.text, "--context", 64)
    done = run("compress", places.model, *SMOOTH, *text, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "holds 4 windows of 64 tokens; 128 were asked for" in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--algorithm", "smoothqant", "--scheme", SCHEME), "unknown algorithm 'smoothqant'. Did you mean"),
        (("--algorithm", "smoothquant:beta=1", "--scheme", SCHEME), "has no option 'beta'"),
        (("--algorithm", "smoothquant", "--scheme", "int9"), "unknown scheme 'int9'"),
        (("--algorithm", "smoothquant"), "it needs a scheme that quantizes activations"),
        (
            (*SMOOTH, "--calibration", "{root}/short.txt"),
            "short.txt holds 3 tokens, fewer than one window of 64",
        ),
        ((*SMOOTH, "--calibration", "{root}/blank.txt"), "blank.txt holds no text"),
        ((*SMOOTH, "--calibration", "{root}/none.txt"), "there is no text file"),
        ((*SMOOTH, "--include", "nothing*"), "rule 'nothing*' matches none"),
        ((*SMOOTH, "--device", "tpu9"), "can't be used"),
        ((*SMOOTH, "--dtype", "int7"), "--dtype takes float32"),
    ],
)
def test_what_is_refused(run, places, tmp_path, options, words):
    """With exit code 1, and nothing is written."""
    given = [option.format(root=places.root) for option in options]
    if "--calibration" not in given:
        given += ["--calibration", str(places.text)]
    done = run("compress", places.model, *given, "--context", 64, "-o", tmp_path / "out")
    assert done.code == 1
    assert words in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


def test_a_scheme_that_does_not_go_with_the_algorithm_is_refused_before_the_model_is_loaded(
    run, places, tmp_path
):
    options = ("--algorithm", "smoothquant", "--scheme", "int8-weight-only", "--calibration", places.text)
    done = run("compress", tmp_path / "absent", *options, "-o", tmp_path / "out")
    assert done.code == 1
    assert "smoothquant can't be applied: int8-weight-only leaves activations" in " ".join(done.err.split())


def test_wrong_usage(run, places, tmp_path):
    assert run("compress", places.model, *SMOOTH, "-o", tmp_path / "out").code == 2
    assert run("compress", places.model, "--calibration", places.text, "-o", tmp_path / "out").code == 2


def codes(directory):
    return {
        name: weight.dequantize()
        for name, weight in ao.load(directory).named_parameters()
        if isinstance(weight, ao.QuantizedTensor)
    }


GPTQ = ("--algorithm", "gptq", "--scheme", "int4-weight-only:group_size=32", "--exclude", "lm_head")


def test_gptq_says_what_each_layer_lost_and_resumes(run, places, tmp_path):
    """Plain output has a line a block; the directory of a finished run is gone."""
    text = ("--calibration", places.text, "--samples", 3, "--context", 32)
    done = run("compress", places.model, *GPTQ, *text, "-o", tmp_path / "one")
    assert done.code == 0, done.err
    lines = [" ".join(line.split()) for line in done.err.splitlines()]
    (line,) = [line for line in lines if line.startswith("2 of 2: model.layers.1: ")]
    assert line.count("error") == 7 and "self_attn.q_proj: error" in line and "(rounded" in line
    walk = tmp_path / "walk"
    again = run("compress", places.model, *GPTQ, *text, "-o", tmp_path / "two", "--resume", walk)
    assert again.code == 0, again.err
    assert not walk.exists()
    first, second = codes(tmp_path / "one"), codes(tmp_path / "two")
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_a_sentencepiece_model_and_padded_texts(run, places, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = tmp_path / "tokenizer.model"
    with pieces.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f g h i j k"] * 20),
            model_writer=file,
            vocab_size=20,
            hard_vocab_limit=False,
        )
    text = ("--calibration", places.text, "--context", 48, "--padded", "--tokenizer", pieces)
    done = run("compress", places.model, *GPTQ, *text, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    notes = json.loads(done.out)["notes"]
    assert all(facts["tokens"] == 48 for facts in notes.values())
    assert "holds 1 texts of 48 tokens; 128 were asked for" in done.err
    words = ("--calibration", places.text, "--context", 600, "--samples", 1)
    done = run("compress", places.model, *GPTQ, *words, "-o", tmp_path / "none")
    assert done.code == 1 and "fewer than one window of 600" in done.err


def test_two_processes_save_what_one_saves(places, run, tmp_path):
    text = ["--calibration", places.text, "--samples", 4, "--context", 32]
    done = run("compress", places.model, *GPTQ, *text, "-o", tmp_path / "one")
    assert done.code == 0, done.err
    script = tmp_path / "ao.py"
    script.write_text("import torch; torch.set_num_threads(1)\nfrom ao_core.cli import main; main()")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    command = [*launch, "compress", places.model, *GPTQ, *text, "-o", tmp_path / "two"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("layers converted") == 1
    first, second = codes(tmp_path / "one"), codes(tmp_path / "two")
    same = [
        torch.isclose(second[name], value, rtol=1e-2, atol=1e-6).flatten() for name, value in first.items()
    ]
    assert torch.cat(same).double().mean() >= 0.999
