"""Copies, casts, state dicts and files of quantized weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tensor_kinds import K, N, StepTensor, exact, linear_of, row_tensor, step_tensor, whole
from torch import nn


def test_copy_takes_the_same_kind_only():
    """What is stored is overwritten in place; the scheme of the target stays."""
    target, source = step_tensor(N, K), step_tensor(N, K, seed=5)
    memory = target.codes.data_ptr()
    target.copy_(source)
    assert torch.equal(target.codes, source.codes)
    assert target.codes.data_ptr() == memory != source.codes.data_ptr()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (torch.ones(N, K), rf"Tensor \({N}, {K}\)"),
        (step_tensor(N, 1), rf"StepTensor \({N}, 1\)"),
        (step_tensor(N, K, step=0.25), r"StepTensor .*'step': 0.25"),
        (row_tensor(N, K), "RowTensor"),
        (step_tensor(N, K, extra=torch.ones(1)), "StepTensor"),
    ],
)
def test_copy_refuses_everything_else(source, found):
    """The error says what to do instead, and nothing is written."""
    target = step_tensor(N, K)
    before = target.codes.clone()
    with pytest.raises(TypeError, match=rf"StepTensor \({N}, {K}\) can only.*{found}.*assign=True"):
        target.copy_(source)
    assert torch.equal(target.codes, before)


def test_a_float_tensor_is_not_overwritten_by_codes():
    """What ``load_state_dict`` without ``assign=True`` would do."""
    model = nn.Sequential(nn.Linear(K, N))
    before = model[0].weight.clone()
    with pytest.raises(RuntimeError, match="assign=True"):
        model.load_state_dict({"0.weight": step_tensor(N, K), "0.bias": torch.ones(N)})
    assert torch.equal(model[0].weight, before)


def test_state_dict_loads_into_a_quantized_module_in_place():
    module, other = linear_of(step_tensor(N, K)), linear_of(step_tensor(N, K, seed=3))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight.codes, module.weight.codes)


def test_weights_only_load():
    """Plain ``torch.save``, ``torch.load`` and pickling-free safe globals keep everything."""
    module = linear_of(step_tensor(N, K, extra=torch.ones(3)))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert type(state["weight"]) is StepTensor
    with torch.device("meta"):
        other = nn.Linear(K, N)
    other.load_state_dict(state, assign=True)
    assert torch.equal(other.weight.codes, module.weight.codes)
    assert torch.equal(other.weight.extra, torch.ones(3))
    assert (other.weight.step, other.weight.scheme) == (0.5, "steps")
    assert torch.equal(other(whole(2, K)), module(whole(2, K)))


def test_deepcopy_shares_no_memory_and_keeps_ties():
    shared = nn.Parameter(step_tensor(N, K), requires_grad=False)
    model = nn.ModuleList([nn.Linear(K, N), nn.Linear(K, N)])
    model[0].weight = model[1].weight = shared
    again = copy.deepcopy(model)
    assert again[0].weight is again[1].weight
    assert again[0].weight is not shared
    assert isinstance(again[0].weight, nn.Parameter)
    again[0].weight.codes.fill_(3)
    assert torch.equal(shared.codes, step_tensor(N, K).codes)
    assert torch.equal(again[1].weight.dequantize(), torch.full((N, K), 1.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_a_model_changes_the_outer_dtype_only(dtype):
    """``.half()`` and the like; codes are never cast, and the original is not touched."""
    model = nn.Sequential(linear_of(step_tensor(N, K)))
    cast = copy.deepcopy(model).to(dtype)
    weight = cast[0].weight
    assert (weight.dtype, weight.codes.dtype) == (dtype, torch.int8)
    assert torch.equal(weight.codes, model[0].weight.codes)
    assert weight.codes.data_ptr() != model[0].weight.codes.data_ptr()
    x = whole(5, K).to(dtype)
    assert cast(x).dtype == dtype
    expected = exact(whole(5, K), model[0].weight, model[0].bias)
    torch.testing.assert_close(cast(x).double(), expected, rtol=0.01, atol=0)
    assert model[0].weight.dtype == torch.float32


def test_half_and_float_on_a_module():
    model = linear_of(step_tensor(N, K)).half()
    assert model.weight.dtype == model(whole(2, K).half()).dtype == torch.float16
    assert model.float().weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_no_cast_to_what_is_no_float(dtype):
    with pytest.raises(TypeError, match="can be cast to a floating dtype"):
        step_tensor(N, K).to(dtype)


def test_moving_to_the_meta_device_and_back_to_empty():
    module = linear_of(step_tensor(N, K)).to("meta")
    assert isinstance(module.weight, StepTensor)
    assert module.weight.codes.device.type == module.weight.device.type == "meta"
    assert module(torch.ones(3, K, device="meta")).shape == (3, N)
    empty = module.to_empty(device="cpu")
    assert (empty.weight.codes.shape, empty.weight.codes.device.type) == ((N, K), "cpu")


def test_shared_memory():
    """For other processes; what a wrapper has of its own is nothing."""
    model = nn.Sequential(linear_of(step_tensor(N, K))).share_memory()
    assert model[0].weight.codes.is_shared()
    assert torch.equal(model[0].weight.codes, step_tensor(N, K).codes)


def test_what_is_kept_of_a_weight_follows_its_attributes():
    weight = step_tensor(N, K)
    names, context = weight.__tensor_flatten__()
    assert weight.__tensor_flatten__() is weight.__tensor_flatten__()
    weight.provider = "somebody"
    assert weight.__tensor_flatten__()[0] == names
    assert weight.__tensor_flatten__()[1] != context and "somebody" in weight.__tensor_flatten__()[1]
    assert (weight.size(), weight.stride()) == (torch.Size([N, K]), (K, 1))
    assert (weight.size(-1), weight.size(dim=0), weight.stride(0)) == (K, N, K)
    assert weight[1:3].size() == (2, K)
    with pytest.raises(IndexError):
        weight.size(2)
    weight.data = step_tensor(N + 1, K)
    assert weight.size() == weight.shape == (N + 1, K)
