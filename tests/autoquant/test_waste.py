"""What a search does once and no more, and that it loses nothing when it is stopped."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao_core as ao
from ao_autoquant import cache, explore, measure, worker
from ao_autoquant.cache import Cache
from ao_autoquant.measure import Reference, quality_of_rows
from ao_autoquant.worker import Worker


def rows(file):
    store = sqlite3.connect(file)
    ((count,),) = store.execute("SELECT COUNT(*) FROM measured")
    store.close()
    return count


def test_rows_of_one_second_are_one_transaction(cache_file, monkeypatch):
    now, written = [100.0], []
    monkeypatch.setattr(cache.time, "monotonic", lambda: now[0])
    real = cache._write
    monkeypatch.setattr(cache, "_write", lambda *a: written.append(len(a[1])) or real(*a))
    with Cache() as known:
        for number in range(30):
            known.put({"i": number}, {"us": float(number)})
            now[0] += 0.1
        assert known.get({"i": 29}) == {"us": 29.0}
        assert len(written) < 5 and 20 < rows(cache_file) < 30
    assert rows(cache_file) == sum(written) == 30
    assert all(Cache().get({"i": number}) == {"us": float(number)} for number in range(30))


def test_a_process_that_ends_writes_what_waits(cache_file):
    code = "from ao_autoquant.cache import Cache\nc = Cache()\nfor i in range(9): c.put({'i': i}, {})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert rows(cache_file) == 9


def test_a_search_that_is_interrupted_keeps_what_it_measured(model, examples, cache_file, monkeypatch):
    real, calls = measure.quality, []

    def interrupted(scheme, reference):
        calls.append(scheme)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(scheme, reference)

    options = {"schemes": ["int8-weight-only", "uint4"], "isolate": False}
    monkeypatch.setattr(measure, "quality", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explore(model, examples, **options)
    assert rows(cache_file) == 2 * 4  # a time and an error, of all that was measured before
    monkeypatch.setattr(measure, "quality", real)
    assert explore(model, examples, **options).reused == 2 * 4


def test_a_refusal_is_asked_of_a_child_once(examples, monkeypatch):
    if "semi-sparse" not in ao.schemes():
        pytest.skip("ao-sparsity is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(3))).eval()
    pruned = model[1].weight.data.view(-1, 4)
    pruned[:, 2:] = 0  # two of four, as the scheme wants
    asked, real = [], Worker.measure
    monkeypatch.setattr(Worker, "measure", lambda *a, **o: asked.append(a[1]) or real(*a, **o))
    x = torch.randn(5, 128)
    first = explore(model, x, schemes=["semi-sparse"])
    assert [name for name, each in first.rejected.items() if "semi-sparse" in each] == ["0", "2"]
    assert first.options["1"]["semi-sparse"].us > 0
    assert asked == [None, "semi-sparse", "semi-sparse"]  # the last: the one that takes it, which is new
    second = explore(model, x, schemes=["semi-sparse"])
    assert second.rejected == first.rejected and second.measured == 0 and len(asked) == 3
    explore(model, x, schemes=["semi-sparse"], isolate=True, remeasure=True)
    assert len(asked) == 3 + 2 * 3


def test_a_weight_is_written_once_for_all_its_candidates(model, examples, monkeypatch):
    saved, real = [], Worker._save
    monkeypatch.setattr(Worker, "_save", lambda *a: saved.append(a[1]) or real(*a))
    options = {"schemes": ["int8-weight-only", "uint4", "int4-weight-only:qparams=minmax"]}
    found = explore(model, examples, **options)
    assert saved.count("inputs") == 2 * 4 and len([name for name in saved if name != "inputs"]) == 2
    for layer in ("0", "2"):
        for name, option in found.options[layer].items():
            if name != "float":
                weight = model[int(layer)].weight.detach()
                x = examples if layer == "0" else F.relu(model[0](examples)).detach()
                exact = F.linear(x, weight, model[int(layer)].bias).detach()
                decoded = ao.parse_scheme(name).quantize(weight).dequantize()
                off = F.linear(x, decoded, model[int(layer)].bias).detach() - exact
                assert option.error == pytest.approx(float(off.norm() / exact.norm()), rel=0.02)


def test_several_children_run_a_scheme_of_a_new_shape_once(examples, monkeypatch):
    """Of two layers of one shape; what runs them does not measure, what measures is one child."""
    asked, real = [], Worker.measure

    def asking(self, scheme, *args, once=False, **options):
        asked.append((scheme, once, id(self)))
        return real(self, scheme, *args, once=once, **options)

    monkeypatch.setattr(Worker, "measure", asking)
    monkeypatch.setattr(worker, "_crew", lambda *_: 2)
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100)).eval()
    schemes = ["int8-weight-only", "uint4", "int4-weight-only:qparams=minmax"]
    found = explore(model, examples, schemes=schemes)
    once = [(scheme, who) for scheme, tried, who in asked if tried]
    assert sorted(scheme for scheme, _ in once) == sorted(schemes) and len({who for _, who in once}) == 2
    assert len({who for _, tried, who in asked if not tried}) == 1
    assert all(option.us > 0 for each in found.options.values() for option in each.values())
    asked.clear()
    assert explore(model, examples, schemes=schemes).measured == 0 and not asked


def test_a_weight_that_changed_is_written_again():
    child, weight = Worker(60), torch.randn(32, 64)
    x = torch.randn(3, 64)
    try:
        first = child.measure("uint4", weight, x, None, [], compiled=False)[0]
        again = child.measure("uint4", weight, x, None, [], compiled=False)[0]
        weight[0] += 100
        other = child.measure("uint4", weight, x, None, [], compiled=False)[0]
    finally:
        child.close()
    assert first == again != other
    expected = measure.quality(ao.parse_scheme("uint4"), measure.Reference(weight, x, None))[0]
    assert other.error == pytest.approx(expected.error, rel=1e-5)


IN_PLACE = """
from dataclasses import dataclass

import ao_core as ao


class Plain(ao.QuantizedTensor):
    data_names = ("values",)

    def dequantize(self):
        return self.values.to(self.dtype)


@dataclass(frozen=True)
class Careless(ao.Scheme):
    name, tensor_types = "careless", (Plain,)

    def choose_qparams(self, weight):
        weight.zero_()
        return {}

    def encode(self, weight, qparams):
        return weight.half()

    def decode(self, codes, qparams):
        return codes.float()

    def pack(self, codes, qparams, *, dtype):
        return Plain(codes, shape=codes.shape, dtype=dtype)


@ao.hookimpl
def ao_register_schemes():
    return [Careless]
"""


def test_a_scheme_that_changes_the_weight_spoils_no_other(site):
    site.install("careless", IN_PLACE)
    child, weight, x = Worker(60), torch.randn(32, 64), torch.randn(3, 64)
    try:
        before = child.measure("uint4", weight, x, None, [], compiled=False)[0]
        child.measure("careless", weight, x, None, [], compiled=False)
        assert child.measure("uint4", weight, x, None, [], compiled=False)[0] == before
    finally:
        child.close()


def test_float_is_run_once_for_a_layer(model, examples, monkeypatch):
    floats, real = [], F.linear

    def linear(x, weight, bias=None):
        if not isinstance(weight, ao.QuantizedTensor):
            floats.append(weight.shape)
        return real(x, weight, bias)

    options = {"schemes": ["int8-weight-only", "uint4", "nf4"], "isolate": False}
    explore(model, examples, **options)
    with torch.no_grad():
        model[0].weight *= 2
    monkeypatch.setattr(measure.F, "linear", linear)
    explore(model, examples, **options)  # times are known; errors are not, the second layer's neither
    profiled, compared = 1, 1
    assert floats.count(model[0].weight.shape) == profiled + compared


def test_tensors_are_read_once(model, examples, monkeypatch):
    read, real = [], measure.digest
    monkeypatch.setattr(measure, "digest", lambda tensor: read.append(id(tensor)) or real(tensor))
    explore(model, examples, schemes=["uint4"], isolate=False)
    wanted = {id(each) for each in model.parameters()}
    assert [each for each in read if each in wanted] == [id(each) for each in model.parameters()]


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("outliers", [0, 5])
@pytest.mark.parametrize("text", ["int4-weight-only:qparams=minmax", "float8-weight-only", "nf4", "uint4"])
def test_the_error_of_a_large_weight_is_taken_from_some_of_its_rows(text, outliers, rows):
    """Close to what all rows say, also where a few of them hold most of the error."""
    torch.manual_seed(0)
    weight, sample, bias = torch.randn(6007, 256), torch.randn(rows, 256), torch.ones(6007)
    weight *= torch.linspace(0.2, 2, 6007)[torch.randperm(6007), None]
    weight[torch.randperm(6007)[:outliers]] *= 40
    scheme = ao.parse_scheme(text)
    taken = []
    spied = replace(scheme)
    object.__setattr__(spied, "quantize", lambda some: taken.append(some) or scheme.quantize(some))
    part = quality_of_rows(spied, Reference(weight, sample, bias), stored=7)
    exact = sample.double() @ weight.double().t() + 1
    wrong = sample.double() @ (scheme.quantize(weight).dequantize().double() - weight.double()).t()
    assert part.bytes == 7 and part.error == pytest.approx(float(wrong.norm() / exact.norm()), rel=0.05)
    assert [len(some) for some in taken] == [1024]


def test_the_error_of_other_weights_is_taken_from_all_rows():
    weight, sample = torch.randn(4096, 256), torch.randn(3, 256)
    scheme = ao.parse_scheme("float8-weight-only")
    assert quality_of_rows(scheme, Reference(weight, sample, None), stored=7) is not None
    for small in (weight[:2047], weight[:, :255].contiguous()):
        assert quality_of_rows(scheme, Reference(small, sample[:, : small.shape[1]], None), stored=7) is None
    whole = ao.parse_scheme("float8-weight-only:granularity=tensor")
    assert not whole.rowwise and quality_of_rows(whole, Reference(weight, sample, None), stored=7) is None
