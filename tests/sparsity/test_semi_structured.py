"""2:4 weights: their bytes, what is refused, and the layouts of sparse tensor cores as far as a CPU goes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao_core as ao
from ao_sparsity.linear import int8_codes, int8_linear_reference, pruned_gaussian
from ao_sparsity.packed24 import compress, decompress
from ao_sparsity.plugin import ao_propose_schemes
from ao_sparsity.semi_structured import (
    PackedSparseTensor,
    SemiSparse,
    SemiSparseInt8Dynamic,
    SemiSparseTensor,
)
from ao_sparsity.sparse_cores import lay_out, rejects_layout, sparse_linear_reference, undo


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 17, 63, 100, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_compressing_keeps_every_value(columns, dtype):
    """Groups with two, one or no value; equal matrices give equal bytes."""
    weight = (10 * pruned_gaussian(50, columns, columns)).to(dtype)
    weight[::3, 1::4] = 0
    weight[7] = 0
    kept, places = compress(weight)
    groups = -(-columns // 4)
    assert kept.shape == (50, 2 * groups) and places.shape == (50, -(-groups // 2))
    assert kept.dtype == dtype and places.dtype == torch.uint8
    assert torch.equal(decompress(kept, places, columns), weight)
    again = compress(decompress(kept, places, columns))
    assert torch.equal(again[0], kept) and torch.equal(again[1], places)


def test_every_pattern_of_a_group():
    patterns = torch.tensor([[i >> b & 1 for b in range(4)] for i in range(16) if i.bit_count() <= 2])
    weight = patterns * torch.arange(1, 5)
    assert torch.equal(decompress(*compress(weight), 4), weight)
    places = compress(weight)[1].flatten()
    assert torch.all((places & 3) < (places >> 2))  # the hardware takes no other order


def test_bytes_are_counted_as_stored():
    weight = pruned_gaussian(128, 1024, 0).bfloat16()
    dense = weight.nbytes
    assert ao.stored_bytes(SemiSparse().quantize(weight)) == dense * 9 // 16
    int8 = ao.parse_scheme("semi-sparse-int8-dynamic").quantize(weight)
    assert ao.stored_bytes(int8) == dense * 5 // 16 + 4 * 128


@pytest.mark.parametrize("scheme", ["semi-sparse", "semi-sparse-int8-dynamic"])
def test_a_weight_that_is_not_pruned_is_refused(scheme):
    """With what to do, and the model as it was."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    model[0].weight.data = pruned_gaussian(32, 64, 0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ao.RejectedError, match=r"layer '1': .* groups of four columns .*wanda:pattern=2:4"):
        ao.quantize_(model, scheme)
    with pytest.raises(ao.RejectedError, match=r"layer '1': .* groups of four"):
        ao.compress_(model, "magnitude:rules=(0=2:4 1=0.5),per=row", [torch.randn(3, 64)], scheme=scheme)
    with pytest.raises(ao.RejectedError, match="groups of four"):
        ao.compress_(model, "gptq", [torch.randn(3, 64)], scheme=scheme)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    made = ao.parse_scheme(scheme)
    dense = torch.randn(4, 64)
    with pytest.raises(ao.RejectedError, match="groups of four"):
        made.pack(
            made.encode(dense, made.choose_qparams(dense)), made.choose_qparams(dense), dtype=dense.dtype
        )


def test_int8_is_exact_in_integers():
    weight, x = pruned_gaussian(33, 1100, 0), torch.randn(5, 1100)
    codes, scale = int8_codes(weight)
    x_scale = x.abs().amax(-1, keepdim=True) / 127
    sums = (x / x_scale).round().long() @ codes.long().t()
    expected = sums.double() * x_scale.double() * scale.view(-1).double()
    found = int8_linear_reference(x, *compress(codes), scale, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    made = ao.parse_scheme("semi-sparse-int8-dynamic").quantize(weight)
    torch.testing.assert_close(F.linear(x, made), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_cutlass_layout_there_and_back(dtype):
    """The layout is made of torch's operators, so that a CPU can check it."""
    weight, x = pruned_gaussian(64, 256, 0), torch.randn(5, 256).bfloat16()
    values, scale = (weight.to(dtype), None) if dtype != torch.int8 else int8_codes(weight)
    packed, meta = lay_out(values, "cutlass")
    assert packed.shape == (64, 128)
    assert torch.equal(undo(packed, meta, (64, 256), "cutlass"), values)
    found = sparse_linear_reference(x, packed, meta, scale, None, 64, "cutlass")
    dense = values.float() if scale is None else values.float() * scale
    assert ao.sqnr(x.double() @ dense.double().t(), found) > 38
    plain = ao.parse_scheme("semi-sparse" if scale is None else "semi-sparse-int8-dynamic").quantize(
        weight.to(torch.bfloat16)
    )
    tensor = PackedSparseTensor.from_plain(plain, "cutlass")
    for name, data in plain.stored().items():
        assert torch.equal(tensor.portable().stored()[name], data), name
    assert torch.equal(tensor.dequantize(), plain.dequantize())
    assert ao.stored_bytes(tensor) == ao.stored_bytes(plain)
    assert ao.sqnr(F.linear(x, plain), F.linear(x, tensor)) > 40


def test_a_cast_is_one_of_what_is_stored():
    weight = SemiSparse().quantize(pruned_gaussian(16, 64, 0))
    half = weight.to(torch.bfloat16)
    assert isinstance(half, SemiSparseTensor) and half.kept.dtype == torch.bfloat16
    assert torch.equal(half.dequantize(), weight.dequantize().bfloat16())


def test_what_is_missing_is_named(monkeypatch):
    cpu = torch.device("cpu")
    for layout in ("cusparselt", "cutlass"):
        assert "need a CUDA device, and it lies on cpu" in rejects_layout(
            layout, (64, 64), torch.bfloat16, cpu
        )
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0, and cuda:0 has 7.5" in rejects_layout(
        "cutlass", (64, 64), torch.int8, cuda
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "without cuSPARSELt" in rejects_layout("cusparselt", (64, 64), torch.bfloat16, cuda)
    assert "no 2:4 product for torch.float32" in rejects_layout("cutlass", (64, 64), torch.float32, cuda)
    assert "multiples of 32 and 64" in rejects_layout("cutlass", (64, 100), torch.float16, cuda)
    made = SemiSparse().quantize(pruned_gaussian(32, 64, 0).bfloat16())
    tensor = PackedSparseTensor.from_plain(made, "cutlass")
    with ao.use_provider("torch"), pytest.raises(ao.RejectedError, match="need a CUDA device, not cpu"):
        F.linear(torch.ones(1, 64, dtype=torch.bfloat16), tensor)


def test_the_report_says_where_it_is_slower(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.data = pruned_gaussian(64, 64, 0)
    report = ao.quantize_(model, "semi-sparse")
    assert "saves bytes, not time" in report.slower["0"] and "slower than float: 0" in str(report)
    assert report.to_dict()["slower"] == report.slower
    assert ao.quantize_(nn.Sequential(nn.Linear(8, 8)), "int8-weight-only").slower == {}
    weight = pruned_gaussian(64, 64, 0)
    assert ao_propose_schemes(fqn="0", weight=weight, sample=torch.ones(9, 64)) == []
    monkeypatch.setattr("ao_sparsity.semi_structured.rejects_layout", lambda *_: None)
    scheme = SemiSparse()
    assert "up to 128 rows" in scheme.slower(weight, rows=16) and scheme.slower(weight, rows=4096) is None
    assert "up to 128 rows" in scheme.slower(weight)
    assert "2:4 int8 products" in SemiSparseInt8Dynamic().slower(weight, rows=4096)
    assert ao_propose_schemes(fqn="0", weight=weight, sample=torch.ones(2, 2048, 64)) == [scheme]
    assert ao_propose_schemes(fqn="0", weight=weight + 1, sample=torch.ones(2, 2048, 64)) == []


def test_a_pruned_model_is_saved_and_loaded(tmp_path):
    def build():
        return nn.Sequential(nn.Linear(100, 63), nn.ReLU(), nn.Linear(63, 17))

    model = build().eval()
    x = torch.randn(5, 100)
    report = ao.compress_(model, ["wanda:pattern=2:4"], [torch.randn(50, 100)], scheme="semi-sparse")
    assert report.converted == {"0": "semi-sparse", "2": "semi-sparse"}
    ao.save(model, tmp_path / "out", plan=report.plan)
    again = ao.load(tmp_path / "out", model=build)
    assert torch.equal(model(x), again(x))
    assert isinstance(again[0].weight, SemiSparseTensor)
