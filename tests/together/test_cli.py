"""The command line on a real, tiny language model: results, exit codes, and nothing half-written."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ao_core as ao
from ao_core import plugins, shards
from ao_core.cli import main

transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
pytestmark = pytest.mark.usefixtures("plain_environment")

SCHEME = "int8-weight-only"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LAYERS = 2 * 7 + 1


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


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model that transformers saved, the same quantized, and texts."""
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
    (root / "empty").mkdir()
    ao.quantize_(model, SCHEME)
    ao.save(model, root / "quantized", tokenizer=tokenizer)
    return SimpleNamespace(
        root=root,
        model=root / "model",
        quantized=root / "quantized",
        text=root / "text.txt",
        short=root / "short.txt",
        empty=root / "empty",
        ids=letters + 1,
    )


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def naive_nll(model, ids, context, stride):
    """Mean NLL of each scored token, by the definition: one window after the other, float64."""
    scores = []
    for start in range(0, len(ids) - context + 1, stride):
        window = ids[start : start + context]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        each = -torch.log_softmax(logits, -1)[:-1].gather(1, window[1:, None]).view(-1)
        scores += each.tolist() if start == 0 else each[-stride:].tolist()
    return sum(scores) / len(scores), len(scores)


def test_quantize_saves_a_model_that_works(run, places, out):
    """The table names what was done; the saved model is that of ``quantize_``."""
    done = run("quantize", places.model, "--scheme", SCHEME, "-o", out, "--exclude", "lm_head")
    assert done.code == 0, done.err
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert f"layers converted {LAYERS - 1}" in lines
    assert "1 lm_head excluded by rule 'lm_head'" in lines
    model = transformers.LlamaForCausalLM.from_pretrained(places.model)
    ao.quantize_(model, SCHEME, exclude="lm_head")
    with torch.no_grad():
        assert torch.equal(ao.load(out)(places.ids[None]).logits, model(places.ids[None]).logits)


def test_quantize_json_is_the_report(run, places, out):
    """Nothing but JSON on standard output; the progress goes elsewhere."""
    done = run("quantize", places.model, "--scheme", f"{SCHEME}:group_size=16", "-o", out, "--json")
    assert done.code == 0, done.err
    model = transformers.LlamaForCausalLM.from_pretrained(places.model)
    report = ao.quantize_(model, SCHEME, group_size=16)
    assert done.data == {"scheme": f"{SCHEME}:group_size=16", "saved": str(out), **report.to_dict()}
    assert "quantizing" in done.err


def test_include_and_exclude_can_be_given_often(run, places, out):
    patterns = ["--include", "*q_proj", "--include", "*k_proj", "--exclude", "model.layers.1.*"]
    done = run("quantize", places.model, "--scheme", "int8-dynamic", "-o", out, "--json", *patterns)
    assert set(done.data["converted"]) == {f"model.layers.0.self_attn.{name}_proj" for name in "qk"}


def test_dtype_is_applied_before(run, places, out):
    done = run("quantize", places.model, "--scheme", SCHEME, "-o", out, "--dtype", "bfloat16", "--json")
    assert done.code == 0, done.err
    assert ao.load(out).dtype == torch.bfloat16
    linears = 36 * (36 + 12 + 12 + 36 + 3 * 63) * 2 + 36 * 27
    assert done.data["converted_bytes_before"] == 2 * linears


@pytest.mark.parametrize("which", ["model", "quantized"])
def test_eval_json(run, places, which):
    """Perplexity by the definition, its standard error, speeds and stored bytes."""
    path = getattr(places, which)
    done = run("eval", path, "--text", places.text, "--context", 64, "--stride", 16, "--json")
    assert done.code == 0, done.err
    data = done.data
    model = ao.load(path) if which == "quantized" else transformers.LlamaForCausalLM.from_pretrained(path)
    nll, count = naive_nll(model.eval(), places.ids, 64, 16)
    assert data["tokens"] == count
    assert data["nll"] == pytest.approx(nll, rel=1e-5)
    assert data["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert 0 < data["nll_se"] < 0.1
    assert data["perplexity_se"] == pytest.approx(data["nll_se"] * data["perplexity"], rel=1e-9)
    assert data["prefill_tokens_per_s"] > 0 and data["decode_tokens_per_s"] > 0
    elements = sum(p.numel() for p in model.parameters())
    smaller = {"model": elements * 4, "quantized": elements * 2}[which]
    assert elements < data["bytes"] <= smaller + 1000


def test_eval_of_a_single_window_has_no_standard_error(run, places):
    """JSON has no NaN."""
    options = ("--context", 300, "--stride", 300, "--no-speed")
    done = run("eval", places.model, "--text", places.text, *options, "--json")
    assert done.code == 0, done.err
    assert done.data["nll_se"] is None
    assert done.data["decode_tokens_per_s"] is None
    assert run("eval", places.model, "--text", places.text, *options).code == 0


def test_eval_in_a_fresh_process_is_the_same_to_the_last_digit(run, run_ao, places):
    arguments = ["eval", str(places.quantized), "--text", str(places.text), "--context", "64", "--no-speed"]
    arguments += ["--stride", "64", "--max-tokens", "200", "--json"]
    here, there = run(*arguments), run_ao(*arguments)
    assert (here.code, there.returncode) == (0, 0), there.stderr
    assert json.loads(there.stdout) == here.data


@pytest.mark.parametrize(
    "command",
    [["plugins"], ["schemes"], ["kernels"], ["kernels", "--explain", "int8_weight_linear"]],
    ids=" ".join,
)
def test_lists_as_json_and_as_tables(run, command):
    done = run(*command, "--json")
    assert done.code == 0, done.err
    assert isinstance(done.data, list) and done.data
    table = run(*command)
    assert table.code == 0, table.err
    first = done.data[0]
    assert str(first[next(iter(first))]).split(",")[0] in table.out


def test_the_lists_are_what_python_says(run):
    assert [row["scheme"] for row in run("schemes", "--json").data] == list(ao.schemes())
    options = {row["scheme"]: row["options"] for row in run("schemes", "--json").data}
    assert options[SCHEME] == {"group_size": -1}
    assert {row["plugin"] for row in run("plugins", "--json").data} >= {"quant"}
    ops = {row["op"]: [k["provider"] for k in row["kernels"]] for row in run("kernels", "--json").data}
    assert "torch" in ops["int8_weight_linear"]
    rows = run("kernels", "--explain", "int8_weight_linear", "--json").data
    keys = {row["key"] for row in rows}
    assert len([row for row in rows if row["chosen"]]) == len(keys)
    assert {row["priority"] for row in rows if row["provider"] == "reference"} == {None}


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
    import shutil

    shutil.copytree(places.quantized, tmp_path / "copy")
    shard = next((tmp_path / "copy").glob("*.safetensors"))
    os.truncate(shard, 1000)
    done = run("eval", tmp_path / "copy", "--text", places.text)
    assert_fails(done, 1, shard.name, "is truncated: 1000 bytes")


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


def test_version_and_help(run):
    assert run("--version").out == f"ao {ao.__version__}\n"
    for arguments in (["--help"], ["-h"], ["quantize", "--help"], ["eval", "-h"]):
        done = run(*arguments)
        assert done.code == 0
        assert "Usage: ao" in done.out


def test_an_error_is_one_line_wherever_it_goes(run, places):
    """A long path stays in one piece when standard error is a pipe."""
    model = "x" * 200 + "/" + "y" * 50 + "/z"
    done = run("eval", model, "--text", places.text)
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert model in line


IMPORT = """
import sys, torch
before = set(sys.modules)
import ao_core
for name in set(ao_core.__all__) - {"testing"}:  # which needs pytest
    getattr(ao_core, name)
print(torch.cuda.is_initialized(), *{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def test_importing_is_light(run_python):
    """Beside torch little is loaded, even if every name is used."""
    initialized, *loaded = run_python(IMPORT).stdout.split()
    heavy = {"triton", "transformers", "typer", "rich", "pytest", "ao_quant", "scipy", "matplotlib", "pandas"}
    assert not heavy & set(loaded)
    assert initialized == "False", "CUDA was initialized"


def test_public_names_are_there():
    for name in ao.__all__:
        assert getattr(ao, name) is not None
    assert set(ao.__all__) <= set(dir(ao))
    with pytest.raises(AttributeError, match="no attribute 'quantise_'"):
        ao.quantise_  # noqa: B018
    assert issubclass(ao.RejectedError, ao.AoError)
    assert issubclass(ao.QuantizedTensor, torch.Tensor)
    assert not issubclass(ao.Scheme, nn.Module)
