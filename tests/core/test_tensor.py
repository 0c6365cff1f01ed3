"""What a quantized weight does beyond the kit: each behaviour against float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensor_kinds import K, N, StepTensor, exact, linear_of, step_tensor, whole

import ao_core as ao


@pytest.mark.parametrize(
    "op",
    [
        torch.relu,
        torch.sum,
        torch.zeros_like,
        lambda w: w + 1,
        lambda w: w == w,  # noqa: PLR0124
        lambda w: w.reshape(-1, 1),
        lambda w: w.mul_(2),
        lambda w: torch.cat([w, w]),
        lambda w: w @ torch.ones(K),
        list,
    ],
)
def test_an_op_that_is_not_known_raises_its_name_and_the_class(op):
    with pytest.raises(NotImplementedError, match=r"StepTensor does not implement aten\.\w+.*dequantize\(\)"):
        op(step_tensor(N, K))


def test_no_float_value_is_given_by_accident():
    for op in (torch.Tensor.numpy, torch.Tensor.tolist):
        with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
            op(step_tensor(N, K))


def test_dequantize_must_be_written():
    class Bare(ao.QuantizedTensor):
        data_names = ("codes",)

    with pytest.raises(NotImplementedError, match=r"Bare must define dequantize\(\)"):
        Bare(torch.ones(2, 2), shape=(2, 2), dtype=torch.float32).dequantize()


def test_wrong_parts_are_refused():
    for data, options in (((torch.ones(2),), {"step": 1}), ((torch.ones(2), None), {"stepp": 1})):
        with pytest.raises(TypeError, match=r"StepTensor takes tensors \('codes', 'extra'\)"):
            StepTensor(*data, shape=(2,), dtype=torch.float32, **options)


def test_metadata_is_that_of_the_float_weight():
    weight = step_tensor(3, N, K, dtype=torch.bfloat16)
    assert (weight.shape, weight.dtype, weight.device.type) == ((3, N, K), torch.bfloat16, "cpu")
    assert (weight.ndim, weight.numel(), weight.is_contiguous()) == (3, 3 * N * K, True)
    assert repr(weight) == (f"StepTensor(shape=(3, {N}, {K}), dtype=bfloat16, device='cpu', scheme='steps')")
    assert list(weight.stored()) == ["codes"]
    assert list(step_tensor(2, 2, extra=torch.ones(1)).stored()) == ["codes", "extra"]


@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 3, K), (0, K)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_exact_in_every_form(shape, bias):
    """``F.linear``, the module, ``@``, ``mm`` and ``addmm`` are one computation."""
    weight, x = step_tensor(N, K), whole(*shape)
    module = linear_of(weight, bias=bias)
    expected = exact(x, weight, module.bias).float()
    with torch.no_grad():
        assert torch.equal(module(x), expected)
        assert torch.equal(F.linear(input=x, weight=weight, bias=module.bias), expected)
        assert torch.equal(x @ weight.t() + (module.bias if bias else 0), expected)
        assert torch.equal(x @ weight.T, exact(x, weight).float())
        if x.ndim == 2 and bias:
            assert torch.equal(torch.addmm(module.bias, x, weight.t()), expected)
            assert torch.equal(
                torch.addmm(module.bias, x, weight.t(), beta=2, alpha=3),
                (3 * exact(x, weight) + 2 * module.bias.double()).float(),
            )


def test_a_quantized_activation_is_refused():
    weight = step_tensor(N, N)
    for arguments in ((weight, weight), (weight, torch.ones(N, N))):
        with pytest.raises(TypeError, match=r"one quantized weight.*dequantize"):
            F.linear(*arguments)


def test_gradients_are_those_of_float64():
    """Of the activations and the bias; the weight has none and stays as it is."""
    weight, x = step_tensor(N, K), whole(2, 5, K).requires_grad_()
    module, upstream = linear_of(weight), whole(2, 5, N, seed=3)
    before = weight.codes.clone()
    module(x).backward(upstream)

    wide = x.detach().double().requires_grad_()
    bias = module.bias.detach().double().requires_grad_()
    F.linear(wide, weight.codes.double() * weight.step, bias).backward(upstream.double())
    assert torch.equal(x.grad.double(), wide.grad)
    assert torch.equal(module.bias.grad.double(), bias.grad)
    assert module.weight.grad is None
    assert not module.weight.requires_grad
    assert torch.equal(weight.codes, before)


@pytest.mark.parametrize("wanted", ["x", "bias", "neither"])
def test_only_the_wanted_gradient_is_computed(wanted):
    weight = step_tensor(N, K)
    x, bias = whole(K), whole(N)
    {"x": x, "bias": bias}.get(wanted, torch.ones(1)).requires_grad_()
    out = F.linear(x, weight, bias)
    assert out.requires_grad == (wanted != "neither")
    if out.requires_grad:
        out.sum().backward()
    assert (x.grad is not None, bias.grad is not None) == (wanted == "x", wanted == "bias")
    if wanted == "x":
        assert torch.equal(x.grad.double(), (weight.codes.double() * weight.step).sum(0))


def test_gradients_flow_through_a_transposed_product():
    weight, x = step_tensor(N, K), whole(5, K).requires_grad_()
    (x @ weight.t()).sum().backward()
    assert torch.equal(x.grad.double(), (weight.codes.double() * weight.step).sum(0).expand(5, K))


@pytest.mark.parametrize("wanted", ["x", "bias", "both", "neither"])
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K)])
def test_a_result_can_be_written_into(shape, wanted):
    """``add_`` and ``mul_`` on what a linear returned, with the gradients of float64."""
    weight, x, bias = step_tensor(N, K), whole(*shape), whole(N)
    x.requires_grad_(wanted in ("x", "both"))
    bias.requires_grad_(wanted in ("bias", "both"))
    residual, factor = whole(*shape[:-1], N, seed=3), whole(*shape[:-1], N, seed=4)
    wide_x, wide_bias = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, bias))

    out = F.linear(x, weight, bias)
    out += residual
    out.mul_(factor)
    expected = (exact(wide_x, weight, wide_bias) + residual.double()) * factor.double()
    assert torch.equal(out.double(), expected)
    if wanted != "neither":
        out.backward(factor)
        expected.backward(factor.double())
    for found, true in ((x, wide_x), (bias, wide_bias)):
        assert found.grad is true.grad is None or torch.equal(found.grad.double(), true.grad)


def test_a_result_that_is_written_into_is_no_copy():
    class Noted(StepTensor):
        def linear(self, x, bias):
            self.made = super().linear(x, bias)
            return self.made

    weight = Noted(*step_tensor(N, K).stored().values(), None, shape=(N, K), dtype=torch.float32, step=0.5)
    out = F.linear(whole(2, 3, K).requires_grad_(), weight, whole(N))
    assert out.data_ptr() == weight.made.data_ptr()


@pytest.mark.parametrize(
    "product",
    [
        lambda x, stack: x @ stack.transpose(-2, -1),
        lambda x, stack: torch.bmm(x, stack.transpose(-2, -1)),
        lambda x, stack: torch.bmm(stack, x.transpose(1, 2)).transpose(1, 2),
        lambda x, stack: torch.stack([torch.mm(x[0], stack[0].t()).mul_(1), F.linear(x[1], stack[1])]),
        lambda x, stack: torch.stack([torch.addmm(x.new_zeros(N), x[i], stack[i].t()) for i in range(2)]),
    ],
    ids=["matmul", "bmm", "bmm from the left", "mm", "addmm"],
)
def test_other_products_can_be_written_into(product):
    stack, x = step_tensor(2, N, K), whole(2, 5, K).requires_grad_()
    factor = whole(2, 5, N, seed=3)
    out = product(x, stack)
    out.mul_(factor)
    values = stack.codes.double() * stack.step
    assert torch.equal(out.double(), x.double() @ values.mT * factor)
    out.backward(torch.ones_like(out))
    assert torch.equal(x.grad.double(), factor.double() @ values)
