"""``ao autoquant`` and ``ao plan``, on a tiny language model."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
from letter_tokenizer import make_tokenizer

import ao_core as ao
from ao_core.cli import main


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=96, **sizes)
    path = tmp_path_factory.mktemp("model") / "tiny"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code


def search(directory, out, *more):
    sizes = ("--prefill", 8, "--decode", 3, "--scheme", "int8-weight-only", "--scheme", "uint4")
    return run("autoquant", directory, "-o", out, *sizes, *more)


def test_search_show_diff_apply(directory, tmp_path, capsys):
    out = tmp_path / "out"
    assert search(directory, out, "--objective", "bytes", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schemes"] == {"uint4": 9}
    plan = ao.Plan.load(out / "plan.json")
    assert plan.layers["lm_head"].evidence["calls"] == {"1": 3.0, "8": 1.0}
    assert "<svg" in (out / "report.html").read_text("utf-8")
    assert isinstance(ao.load(out).lm_head.weight, ao.QuantizedTensor)

    assert run("plan", "show", out / "plan.json") == 0
    assert "lm_head" in capsys.readouterr().out
    layers = {**plan.layers, "lm_head": ao.Choice(None, reason="no")}
    changed = ao.Plan(layers, {**plan.fingerprint, "torch": "9"})
    changed.save(tmp_path / "other.json")
    assert run("plan", "diff", out / "plan.json", tmp_path / "other.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == {"lm_head": ["uint4", "float"]}

    assert run("plan", "apply", tmp_path / "other.json", directory, "-o", tmp_path / "applied") == 0
    assert "torch was 9" in capsys.readouterr().err
    assert not isinstance(ao.load(tmp_path / "applied").lm_head.weight, ao.QuantizedTensor)

    del changed.layers["lm_head"]
    changed.save(tmp_path / "less.json")
    assert run("plan", "apply", tmp_path / "less.json", directory, "-o", tmp_path / "applied") == 0
    assert "1 left alone: lm_head: the plan does not name it" in capsys.readouterr().out
    arguments = ("plan", "apply", tmp_path / "less.json", directory, "-o", tmp_path / "applied", "--json")
    assert run(*arguments) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == {"lm_head": "the plan does not name it"}


def test_what_fails_says_so_and_writes_nothing(directory, tmp_path, capsys):
    out = tmp_path / "out"
    assert search(directory, out, "--max-bytes", 10) == 1
    assert "max_bytes=10 (the least reachable is" in capsys.readouterr().err
    assert search(directory, out, "--objective", "speed") == 1
    assert "'speed' was given" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("")
    assert search(directory, out) == 1
    assert "holds mine.txt and no ao.json" in capsys.readouterr().err
    for place in (out / "mine.txt", out / "mine.txt" / "below"):  # said before the model is loaded
        assert search(tmp_path / "no-model", place) == 1
        assert f"can't save to {place}" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text('{"format": 99}')
    assert run("plan", "show", tmp_path / "bad.json") == 1
    assert "format 99" in capsys.readouterr().err


def test_texts_that_do_not_fit_are_refused(directory, tmp_path, capsys):
    """Those that can't be read before the model is loaded; the others before anything is measured."""
    (tmp_path / "no-utf8.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "text.txt").write_text("a b c d " * 20)
    for name, words in (("no-utf8.txt", "is no UTF-8 text"), ("empty.txt", "no text"), ("x", "no text file")):
        assert search(tmp_path / "no-model", tmp_path / "out", "--text", tmp_path / name) == 1
        assert words in capsys.readouterr().err
    model = shutil.copytree(directory, tmp_path / "model")
    assert search(model, tmp_path / "out", "--text", tmp_path / "text.txt") == 1
    assert "the model came without one" in capsys.readouterr().err
    make_tokenizer().save_pretrained(model)
    assert search(model, tmp_path / "out", "--text", tmp_path / "text.txt", "--prefill", 100) == 1
    assert "the text has 80 tokens" in capsys.readouterr().err
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=3, max_position_embeddings=32, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    assert search(model, tmp_path / "out", "--text", tmp_path / "text.txt") == 1
    assert "holds token 4, and the model's vocabulary has 3 tokens" in capsys.readouterr().err
    assert search(model, tmp_path / "out", "--prefill", 64) == 1
    assert "the model takes 32 at most" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_measurements_that_cannot_be_kept_are_a_warning(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AO_AUTOQUANT_CACHE", str(tmp_path))
    assert search(directory, tmp_path / "out") == 0
    assert f"warning: measurements can't be kept in {tmp_path}" in " ".join(capsys.readouterr().err.split())


def test_a_disk_that_is_full_after_the_model_is_an_error(directory, tmp_path, capsys, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ao_autoquant.report.write", write)
    assert search(directory, tmp_path / "out") == 1
    assert "report.html can't all be written: No space left" in capsys.readouterr().err


def test_a_plan_of_long_names_is_whole_at_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = "int8-dynamic-int4-weight:group_size=32,zero_point=integer"
    evidence = {"us": 12345.6, "float_us": 23456.7, "error": 0.01234}
    names = [f"model.layers.{number}.self_attn.q_proj" for number in (10, 11)]
    layers = {name: ao.Choice(long, evidence=evidence) for name in names}
    ao.Plan({**layers, "lm_head": ao.Choice(None, reason="it is tied")}, ao.fingerprint()).save(
        tmp_path / "plan.json"
    )
    assert run("plan", "show", tmp_path / "plan.json") == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "float: it is tied" in lines
    assert long in lines
    assert [line.split() for line in lines if "q_proj" in line] == [
        [name, "12345.6", "23456.7", "0.0123"] for name in names
    ]


def test_nats_check_refine_and_go_on_from_what_was_found(directory, tmp_path, capsys):
    pytest.importorskip("ao_gptq", reason="refines by GPTQ")
    out, again = tmp_path / "out", tmp_path / "again"
    nats = ("--error-measure", "loss", "--max-error", 5, "--check", "--windows", 4)
    assert search(directory, out, "--objective", "bytes", *nats, "--refine", "gptq", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    check, refined = printed["evidence"]["check"], printed["evidence"]["refined"]
    assert printed["error_measure"] == "loss" and printed["schemes"] == {"uint4": 9}
    assert check["predicted"] == pytest.approx(printed["plan"]["error"]) and check["loss"]["rows"] == 4 * 8
    assert refined["nll"] is not None and list(printed["rounded"]) == ["model.embed_tokens"]
    plan = ao.Plan.load(out / "plan.json")
    assert plan.evidence == printed["evidence"] and plan.layers["lm_head"].evidence["gptq"]
    assert "nats of KL" in (out / "report.html").read_text("utf-8")

    options = ("--objective", "bytes", *nats, "--remeasure", "--from", out / "exploration.json")
    assert search(directory, again, *options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "0 numbers measured" in shown and "on the whole model the plan costs" in shown
    impossible = ("--objective", "bytes", "--error-measure", "loss", "--max-bytes", 1)
    assert search(directory, tmp_path / "no", *impossible) == 1
    assert search(directory, tmp_path / "no", "--error-measure", "nats") == 1
    assert "'nats' was given" in capsys.readouterr().err
    assert search(directory, tmp_path / "no", "--refine", "gptqq") == 1
    assert "unknown algorithm 'gptqq'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
