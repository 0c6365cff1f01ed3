"""Profiling, measuring, choosing, and what is done with schemes that fail."""

from __future__ import annotations

import copy
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao_core as ao
from ao_autoquant import autoquant, explore, report, worker
from ao_autoquant.cache import Cache
from ao_autoquant.plans import differences
from ao_autoquant.profile import SAMPLE_ROWS, profile
from ao_autoquant.search import FLOAT, Budget

FEW = {"schemes": ["int8-weight-only", "uint4"], "isolate": False}


def test_profile_counts_rows_and_keeps_activations(model, examples):
    found = profile(model, [examples, examples[:1], examples[2:3]], weights=[1, 8, 2])
    assert found.seen["0"].calls == {5: 1.0, 1: 10.0}
    assert torch.equal(found.seen["0"].sample[:5], examples)
    expected = F.relu(F.linear(examples, model[0].weight, model[0].bias))
    torch.testing.assert_close(found.seen["2"].sample[:5], expected)
    assert not model[0]._forward_pre_hooks


def test_the_sample_is_bounded(model):
    found = profile(model, [torch.randn(4000, 100), torch.randn(3000, 100)])
    assert 128 <= len(found.seen["0"].sample) <= SAMPLE_ROWS


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.never = nn.Linear(17, 17), nn.Linear(17, 17)
        self.again = nn.Linear(17, 17)
        self.again.weight = self.used.weight
        self.table = nn.Embedding(4, 17)

    def forward(self, *, x):
        return self.again(input=self.used(x))


def test_keywords_ties_and_layers_that_are_not_called():
    model = Keywords().train()
    found = profile(model, {"x": torch.randn(2, 3, 17)})
    assert set(found.seen) == {"used"}
    assert found.seen["used"].calls == {6: 2.0}
    assert found.left["never"] == "the example inputs never reached it"
    assert found.left["table"] == "the example inputs never reached it"
    assert model.training and model.used.training


def test_errors_and_bytes_are_those_of_the_scheme(model, examples):
    found = explore(model, examples, **FEW)
    for name in FEW["schemes"]:
        weight = ao.parse_scheme(name).quantize(model[0].weight)
        exact = F.linear(examples.double(), model[0].weight.double(), model[0].bias.double())
        off = (F.linear(examples, weight, model[0].bias).double() - exact).detach()
        option = found.options["0"][name]
        assert option.error == pytest.approx(float(off.norm() / exact.detach().norm()), rel=1e-3)
        assert option.bytes == ao.stored_bytes(weight)
        assert option.us > 0
    assert found.options["0"][FLOAT].error == 0
    total = found.totals(dict.fromkeys(found.options, FLOAT))
    assert total.bytes == ao.model_bytes(model).total


def test_every_installed_scheme_is_measured_or_has_a_reason(model, examples):
    found = explore(model, examples, isolate=False)
    for layer in ("0", "2"):
        known = {*found.options[layer], *found.rejected[layer], *(fault.scheme for fault in found.faults)}
        assert set(ao.schemes()) <= known
    assert "int4-weight-only:group_size=32" in found.options["0"]  # by the hook


def test_bytes_as_objective_and_as_limit(model, examples):
    before = copy.deepcopy(model.state_dict())
    plan = autoquant(model, examples, objective="bytes", **FEW)
    assert {choice.scheme for choice in plan.layers.values()} == {"uint4"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert ao.Plan.from_json(plan.to_json()) == plan
    size = sum(ao.stored_bytes(ao.parse_scheme("uint4").quantize(model[i].weight)) for i in (0, 2))
    limit = size + sum(model[i].bias.nbytes for i in (0, 2))
    autoquant(model, examples, max_bytes=limit, **FEW, apply=True)
    assert ao.model_bytes(model).total == limit


def test_no_error_allowed_leaves_float_and_says_why(model, examples):
    plan = autoquant(model, examples, max_error=0, **FEW)
    assert [choice.scheme for choice in plan.layers.values()] == [None, None]
    assert all("float is" in choice.reason for choice in plan.layers.values())
    assert plan.layers["0"].evidence["calls"] == {"5": 1.0}


def test_the_second_search_measures_nothing(model, examples):
    first = explore(model, examples, **FEW)
    second = explore(model, examples, **FEW)
    assert first.measured == 2 * 3 * 2 and first.reused == 0
    assert second.measured == 0 and second.reused == first.measured
    assert second.options == first.options
    model[0].weight.data *= 1.5  # other values: errors anew, times not
    third = explore(model, examples, **FEW)
    assert 0 < third.measured <= 6
    assert third.options["0"]["uint4"].us == first.options["0"]["uint4"].us
    assert explore(model, examples, **FEW, remeasure=True).reused == 0


def test_two_processes_write_one_cache(cache_file):
    code = (
        "import sys\nfrom ao_autoquant.cache import Cache\nc = Cache()\n"
        "for i in range(150): c.put({'who': sys.argv[1], 'i': i}, {'us': float(i)})\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, who]) for who in "ab"]
    assert [each.wait(120) for each in both] == [0, 0]
    cache = Cache()
    assert all(cache.get({"who": who, "i": i}) == {"us": float(i)} for who in "ab" for i in range(150))


def test_a_corrupt_cache_is_set_aside(cache_file):
    cache_file.write_bytes(b"no database" * 200)
    with pytest.warns(RuntimeWarning, match="not used"):
        Cache().put({"a": 1}, {"us": 2.0})
    assert Cache().get({"a": 1}) == {"us": 2.0}
    assert cache_file.with_suffix(".unusable").read_bytes().startswith(b"no database")


def test_a_cache_of_another_format_is_set_aside(cache_file):
    with sqlite3.connect(cache_file) as store:
        store.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.warns(RuntimeWarning, match="its format is 99"):
        Cache()


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AO_AUTOQUANT_CACHE", str(tmp_path / "file" / "below.sqlite"))
    with pytest.warns(RuntimeWarning, match="AO_CACHE_DIR"):
        cache = Cache()
    cache.put({"a": 1}, {"us": 2.0})
    assert cache.get({"a": 1}) == {"us": 2.0}


BROKEN = """
import os, time
from dataclasses import dataclass

import ao_core as ao
import torch


class Plain(ao.QuantizedTensor):
    data_names = ("values",)

    def dequantize(self):
        return self.values.to(self.dtype) * {factor}


@dataclass(frozen=True)
class Broken(ao.Scheme):
    name, tensor_types = {name!r}, (Plain,)

    def choose_qparams(self, weight):
        return {{}}

    def encode(self, weight, qparams):
        {act}
        return weight.half()

    def decode(self, codes, qparams):
        return codes.float()

    def pack(self, codes, qparams, *, dtype):
        return Plain(codes, shape=codes.shape, dtype=dtype)


@ao.hookimpl
def ao_register_schemes():
    return [Broken]


@ao.hookimpl
def ao_propose_schemes(fqn):
    {propose}
"""


@pytest.mark.parametrize("children", [1, 3])
def test_schemes_that_fail_are_rows_not_failures(children, site, model, examples, monkeypatch):
    """Measured by one child, or run before by several, as where kernels are compiled."""
    monkeypatch.setattr(worker, "_crew", lambda *_: children)
    kinds = {
        "raises": ("1 / 0", "1"),
        "hangs": ("time.sleep(600)", "1"),
        "dies": ("os._exit(7)", "1"),
        "lies": ("pass", "float('nan')"),
        "works": ("pass", "1"),
    }
    for name, (act, factor) in kinds.items():
        propose = "raise KeyError('lost')" if name == "works" else "return []"
        site.install(name, BROKEN.format(name=name, act=act, factor=factor, propose=propose))
    found = explore(model, examples, limit_s=10)
    faults = {fault.scheme: fault for fault in found.faults}
    assert "ZeroDivisionError" in faults["raises"].error
    assert faults["hangs"].hung and "10 s" in faults["hangs"].error
    assert "exit code 7" in faults["dies"].error
    assert "NaN" in faults["lies"].error
    assert faults["dies"].distribution == "dies"
    assert "KeyError" in found.proposals["works"]
    assert "works" not in faults and "works" in found.options["0"]
    assert not {"dies", "hangs"} & {fault.scheme for fault in found.faults if fault.layer != "0"}
    chosen = found.choose("bytes")
    assert not {"raises", "hangs", "dies", "lies"} & set(chosen.values())
    page = report.html(found, chosen, title="t", objective="bytes", budget=Budget())
    assert all(name in page for name in ("ZeroDivisionError", "exit code 7", "KeyError"))


def test_only_what_is_not_known_to_work_runs_in_a_child(site, tmp_path, examples):
    """Whoever provides a scheme, its first measurement on a shape is made elsewhere, and no other."""
    log = tmp_path / "log"
    act = f"open({str(log)!r}, 'a').write(f'{{os.getpid() == {os.getpid()}}} {{tuple(weight.shape)}}\\n')"
    site.install("logs", BROKEN.format(name="logs", act=act, factor="1", propose="return []"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100), nn.Linear(100, 17)).eval()
    found = explore(model, examples, schemes=["logs"])
    assert not found.faults and all("logs" in each for each in found.options.values())
    assert log.read_text().split("\n")[:-1] == ["False (100, 100)", "True (100, 100)", "False (17, 100)"]
    assert all(each[FLOAT].us > 0 for each in found.options.values())
    log.unlink()
    with torch.no_grad():
        model[0].weight *= 2
    explore(model, examples, schemes=["logs"])
    lines = log.read_text().split("\n")[:-1]
    assert lines and not any("False" in line for line in lines)


def test_compiled_linears_are_timed_as_compiled(model, examples, monkeypatch):
    compiled, made = torch.compile, []

    def spy(function, **options):
        made.append((function, options))
        return compiled(function, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", spy)
    eager = explore(model, examples, **FEW)
    assert not made
    found = explore(model, examples, compiled=True, **FEW)
    assert made == [(F.linear, {"dynamic": False})] * 6  # two layers, float and two schemes
    assert found.measured == eager.measured and not found.faults  # eager times are not taken for these
    for layer, options in found.options.items():
        assert all(options[name].error == eager.options[layer][name].error for name in options)
    again = explore(model, examples, compiled=True, **FEW)
    assert again.measured == 0 and again.options == found.options


def test_a_strangers_scheme_is_chosen_where_only_it_fits(model, examples):
    if "ternary" not in ao.schemes():
        pytest.skip("ao-ternary is not installed")
    found = explore(model, examples, schemes=["int8-weight-only", "ternary"], isolate=False)
    exact = F.linear(examples, model[0].weight, model[0].bias)
    off = F.linear(examples, ao.parse_scheme("ternary").quantize(model[0].weight), model[0].bias) - exact
    assert found.options["0"]["ternary"].error == pytest.approx(float(off.norm() / exact.norm()), rel=1e-4)
    least = found.totals(found.choose("bytes")).bytes
    assert set(found.choose("error", Budget(max_bytes=least)).values()) == {"ternary"}
    assert "ternary" not in found.choose("error").values()


def test_the_examples_own_error_comes_through(model):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        autoquant(model, torch.randn(2, 99))
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("examples", "options", "words"),
    [
        ([], {}, "empty"),
        ("text", {}, "str"),
        (torch.randn(1, 100), {"weights": [1, 2]}, "each of 1 examples"),
        (torch.randn(1, 100), {"weights": [0]}, "positive"),
        (torch.randn(1, 100), {"schemes": ["int8-weight-only:sise=3"]}, "sise"),
        (torch.randn(1, 100), {"max_bytes": -3}, "max_bytes"),
    ],
)
def test_bad_input(model, examples, options, words):
    with pytest.raises(ao.OptionError, match=words):
        autoquant(model, examples, **options)


def test_models_without_values_or_linears():
    with pytest.raises(ao.ModelError, match="meta device"):
        autoquant(nn.Linear(4, 4, device="meta"), torch.randn(1, 4))
    with pytest.raises(ao.ModelError, match="no layer to search"):
        autoquant(nn.ReLU(), torch.randn(1, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(model, examples, bad, cache_file):
    model[2].weight.data[3, 5] = bad
    with pytest.raises(ao.ModelError, match="'2' holds NaN or infinity in float32"):
        autoquant(model, examples)
    assert not cache_file.exists()


def test_the_page_needs_nothing_beside_it(model, examples):
    found = explore(model, examples, **FEW)
    chosen = found.choose("bytes", Budget(max_error=0.5))
    page = report.html(found, chosen, title="a <b>", objective="bytes", budget=Budget(max_error=0.5))
    assert "<svg" in page and "a &lt;b&gt;" in page and "max_error=0.5" in page
    assert all(word not in page.lower() for word in ("<script", "<link", "src=", "@import"))
    json.dumps(report.summary(found, chosen))


def test_plans_are_compared(model, examples):
    found = explore(model, examples, **FEW)
    a, b = found.plan("bytes"), found.plan("error")
    assert differences(a, b) == {
        "layers": {"0": ("uint4", "float"), "2": ("uint4", "float")},
        "fingerprint": {},
    }


def test_saved_measurements(model, examples, tmp_path):
    found = explore(model, examples, **FEW)
    found.save(tmp_path / "found.json")
    data = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert data["options"]["0"]["uint4"]["bytes"] == found.options["0"]["uint4"].bytes


def test_the_blocks_of_the_page_run():
    page = (Path(__file__).parents[2] / "docs" / "autoquant.md").read_text("utf-8")
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(code, names)
    assert names["found"].totals(names["found"].choose("error", Budget(max_bytes=600_000))).bytes <= 600_000
