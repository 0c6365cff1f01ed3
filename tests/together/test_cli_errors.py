"""Errors of the command line: exit codes, one clear line, and nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch

from ao_core import plugins, shards

transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
pytestmark = pytest.mark.usefixtures("plain_environment")

SCHEME = "int8-weight-only"


@pytest.fixture
def no_loading(monkeypatch):
    """Loading a model is an error: the fault must be found before."""

    def load_model(*_, **__):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("ao_core.models.load_model", load_model)


def assert_fails(done, code, *words):
    """A clear error on standard error, no result, no traceback."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    for text in words:
        assert text in done.err


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("json_flag", [(), ("--json",)])
@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("int8-weight-onyl", "Did you mean 'int8-weight-only'"),
        ("nowhere", "Installed: "),
        (f"{SCHEME}:group=3", "has no option 'group'; it has group_size"),
        (f"{SCHEME}:group_size=0", "group_size 1 or more"),
        (f"{SCHEME}:group_size", "has no '='"),
    ],
)
def test_a_scheme_that_cannot_be_made(run, places, out, scheme, words, json_flag):
    assert_fails(run("quantize", places.model, "--scheme", scheme, "-o", out, *json_flag), 1, words)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "model", "-o", "out"],
        ["quantize", "model", "--scheme", SCHEME],
        ["quantize", "--scheme", SCHEME, "-o", "out"],
        ["quantize", "model", "--scheme", SCHEME, "-o", "out", "--nope"],
        ["eval", "model"],
        ["eval", "model", "--text", "x", "--context", "1"],
        ["eval", "model", "--text", "x", "--stride", "many"],
        ["nope"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(run, arguments):
    done = run(*arguments)
    assert done.code == 2
    assert "Usage: ao" in done.err + done.out


@pytest.mark.usefixtures("no_loading")
def test_an_output_that_cannot_be_written_is_known_before_loading(run, places, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for place, words in (
        ("file", "it is a file"),
        ("file/below", "not writable"),
        ("full", "holds notes.txt"),
        ("/proc/x", "not writable"),
        (places.model, "no ao.json"),
    ):
        done = run("quantize", places.model, "--scheme", SCHEME, "-o", tmp_path / place)
        assert_fails(done, 1, f"can't save to {tmp_path / place}", words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


@pytest.mark.usefixtures("no_loading")
def test_a_missing_text_is_known_before_loading(run, places, tmp_path):
    done = run("eval", places.model, "--text", tmp_path / "absent.txt")
    assert_fails(done, 1, "no text file", "absent.txt")


def test_texts_that_cannot_be_scored(run, places, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for text, words in (
        (places.short, "the text has 3 tokens and one window takes 512"),
        (tmp_path / "blank.txt", "holds no text"),
        (tmp_path / "binary.txt", "is no UTF-8 text"),
    ):
        assert_fails(run("eval", places.model, "--text", text), 1, words)
    done = run("eval", places.model, "--text", places.text, "--context", 64, "--stride", 65)
    assert_fails(done, 1, "stride must lie between 1 and the context 64")


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_what_is_no_model(run, places, out, command):
    rest = {
        "quantize": ["--scheme", SCHEME, "-o", out],
        "eval": ["--text", places.text],
    }[command]
    for model, words in (
        (places.empty, "is no model directory: it holds nothing"),
        (places.root / "absent", "does not exist"),
        (places.text, "no GGUF"),
    ):
        assert_fails(run(command, model, *rest), 1, str(model), words)
    assert not out.exists()


def test_devices_and_dtypes_that_there_are_not(run, places, out):
    base = ("quantize", places.model, "--scheme", SCHEME, "-o", out)
    assert_fails(run(*base, "--device", "toaster"), 1, "--device 'toaster' can't be used")
    assert_fails(run(*base, "--dtype", "int8"), 1, "--dtype takes float32, bfloat16, float16")
    if not torch.cuda.is_available():
        assert_fails(run(*base, "--device", "cuda"), 1, "--device 'cuda' can't be used", "Try cpu")
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--include", "q_proj"], "rule 'q_proj' matches none of the 16 layers"),
        (["--exclude", "*nothing*"], "rule '*nothing*' matches none"),
        (["--include", "re:("], "'re:(' is no regular expression"),
        (["--exclude", "*"], "has no layer that can be converted"),
    ],
)
def test_patterns_that_do_not_fit(run, places, out, option, words):
    assert_fails(run("quantize", places.model, "--scheme", SCHEME, "-o", out, *option), 1, words)
    assert not out.exists()


def test_a_quantized_model_is_not_quantized_again(run, places, out):
    done = run("quantize", places.quantized, "--scheme", SCHEME, "-o", out)
    assert_fails(done, 1, "has no layer that can be converted", "quantized already (int8-weight-only)")
    assert not out.exists()


def test_a_weight_that_is_not_finite(run, places, tmp_path, out):
    model = transformers.LlamaForCausalLM.from_pretrained(places.model)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    done = run("quantize", tmp_path / "nan", "--scheme", SCHEME, "-o", out)
    assert_fails(done, 1, "layer 'model.layers.1.mlp.up_proj'", "1 of its 2268 values are NaN")
    assert not out.exists()


def test_a_cast_that_overflows_names_the_dtype(run, places, tmp_path, out):
    model = transformers.LlamaForCausalLM.from_pretrained(places.model)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e6
    model.save_pretrained(tmp_path / "large")
    done = run("quantize", tmp_path / "large", "--scheme", SCHEME, "--dtype", "float16", "-o", out)
    assert_fails(done, 1, "1 of its 2268 values are NaN or infinite in float16", "a cast that overflowed")


def test_a_full_disk(run, places, out, monkeypatch):
    """Exit code 1, and neither a directory nor an earlier checkpoint is spoilt."""

    def save_file(tensors, path, metadata=None):
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ("quantize", places.model, "--scheme", SCHEME, "-o", out)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", save_file)
        assert_fails(run(*command), 1, "No space left", "Free some space")
        assert not out.exists()
    assert run(*command).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(shards, "save_file", save_file)
    assert_fails(run("quantize", places.model, "--scheme", "int8-dynamic", "-o", out), 1, "No space left")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_damaged_checkpoint_is_named(run, places, tmp_path):
    shutil.copytree(places.quantized, tmp_path / "copy")
    shard = next((tmp_path / "copy").glob("*.safetensors"))
    os.truncate(shard, 1000)
    done = run("eval", tmp_path / "copy", "--text", places.text)
    assert_fails(done, 1, shard.name, "is truncated: 1000 bytes")


def test_a_file_that_is_not_as_it_was_saved_is_a_warning(run, places, tmp_path):
    shutil.copytree(places.quantized, tmp_path / "edited")
    (tmp_path / "edited" / "generation_config.json").write_text("{}")
    done = run("eval", tmp_path / "edited", "--text", places.text, "--context", 64, "--no-speed")
    assert done.code == 0
    assert "generation_config.json is not as it was saved with the model" in " ".join(done.err.split())


def test_a_checkpoint_of_an_absent_plugin_names_the_distribution(run, places, monkeypatch):
    monkeypatch.setenv("AO_DISABLE_PLUGINS", "quant")
    plugins.reset()
    try:
        done = run("eval", places.quantized, "--text", places.text)
    finally:
        monkeypatch.delenv("AO_DISABLE_PLUGINS")
        plugins.reset()
    assert_fails(done, 1, "pip install ao-quant==")


def test_an_unknown_op_offers_names(run):
    done = run("kernels", "--explain", "int8_weight_liner")
    assert_fails(done, 1, "unknown op 'int8_weight_liner'. Did you mean 'int8_weight_linear'")


def test_an_error_is_one_line_wherever_it_goes(run, places):
    """A long path stays in one piece when standard error is a pipe."""
    model = "x" * 200 + "/" + "y" * 50 + "/z"
    done = run("eval", model, "--text", places.text)
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert model in line
