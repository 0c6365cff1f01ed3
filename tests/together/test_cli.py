"""``ao quantize``, ``ao eval`` and the lists, on a real, tiny language model."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
import torch

import ao_core as ao

transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
pytestmark = pytest.mark.usefixtures("plain_environment")

SCHEME = "int8-weight-only"
LAYERS = 2 * 7 + 1


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


def test_a_shorter_window_is_enough_said(run, places):
    """Windows overlap by half unless told otherwise."""
    done = run("eval", places.model, "--text", places.text, "--context", 64, "--no-speed", "--json")
    assert done.code == 0, done.err
    assert done.data["stride"] == 32


def test_eval_of_a_single_window_has_no_standard_error(run, places):
    """JSON has no NaN, nor has the table."""
    options = ("--context", 300, "--stride", 300, "--no-speed")
    done = run("eval", places.model, "--text", places.text, *options, "--json")
    assert done.code == 0, done.err
    assert done.data["nll_se"] is None
    assert done.data["decode_tokens_per_s"] is None
    done = run("eval", places.model, "--text", places.text, *options)
    assert done.code == 0 and "nan" not in done.out


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


def test_names_are_whole_at_80_columns(run, monkeypatch):
    """Schemes and their options, and what a choice of kernels is explained for."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("schemes").out
    for name, scheme in ao.schemes().items():
        options = [f"{field.name}={field.default}" for field in fields(scheme)]
        assert all(text in shown for text in (name, *options)), name
    rows = run("kernels", "--explain", "int8_weight_linear", "--json").data
    lines = run("kernels", "--explain", "int8_weight_linear").out.splitlines()
    assert {row["key"] for row in rows} <= set(lines)


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


def test_version_and_help(run):
    assert run("--version").out == f"ao {ao.__version__}\n"
    for arguments in (["--help"], ["-h"], ["quantize", "--help"], ["eval", "-h"]):
        done = run(*arguments)
        assert done.code == 0
        assert "Usage: ao" in done.out
