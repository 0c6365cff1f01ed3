"""What a quantized weight does beyond the kit: each behaviour against float64 arithmetic."""

from __future__ import annotations

import copy
import io
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao_core as ao
from ao_core.tensor import TransposedWeight

N, K = 17, 63


class StepTensor(ao.QuantizedTensor):
    """``codes * step``: exact in every float dtype, so that results can be compared bit for bit."""

    data_names = ("codes", "extra")
    attr_names = ("step",)
    row_data = ("codes",)

    def dequantize(self):
        return self.codes.to(self.dtype) * self.step


class RowTensor(ao.QuantizedTensor):
    """One scale a row; everything that is stored is cut along with the rows."""

    data_names = ("codes", "scale")

    def dequantize(self):
        return (self.codes.float() * self.scale).to(self.dtype)


def step_tensor(*shape, step=0.5, extra=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    return StepTensor(codes, extra, shape=shape, dtype=dtype, step=step, scheme="steps")


def row_tensor(*shape, seed=0):
    codes = step_tensor(*shape, seed=seed).codes
    scale = torch.arange(1, 1 + math.prod(shape[:-1])).view(*shape[:-1], 1) / 64
    return RowTensor(codes, scale, shape=shape, dtype=torch.float32)


def whole(*shape, seed=1):
    """Small whole numbers as float32: products and sums are exact."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def linear_of(weight, *, bias=True):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias:
        module.bias.data.copy_(whole(weight.shape[0], seed=9))
    return module


def exact(x, weight, bias=None):
    """``F.linear`` in float64 on the codes themselves."""
    out = x.double() @ (weight.codes.double() * weight.step).t()
    return out if bias is None else out + bias.double()


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


ROWS = [slice(3, 9), slice(None, 5), slice(-4, None), slice(0, N, 3), slice(5, 5), slice(20, 30)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("make", [step_tensor, row_tensor])
def test_slices_of_rows(make, rows):
    """Equal to slices of the values, and views: no code is copied."""
    weight = make(N, K)
    part = weight[rows]
    assert type(part) is type(weight)
    assert torch.equal(part.dequantize(), weight.dequantize()[rows])
    if part.numel():
        assert part.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()
        assert torch.equal(F.linear(whole(3, K), part), F.linear(whole(3, K), weight)[:, rows])


def test_cuts_of_a_stack():
    """``[E, N, K]``: experts by index, rows of all experts."""
    weight = row_tensor(3, N, K)
    values = weight.dequantize()
    for part, expected in (
        (weight[1], values[1]),
        (weight[-1], values[-1]),
        (weight[1:], values[1:]),
        (weight[:, 2:7], values[:, 2:7]),
        (weight[2][4:], values[2][4:]),
    ):
        assert torch.equal(part.dequantize(), expected)
    assert torch.equal(weight.mT.dequantize(), values.mT)
    for dims in ((0, 1), (0, 2)):
        with pytest.raises(NotImplementedError, match="transposition"):
            weight.transpose(*dims)
    assert torch.equal(weight.permute(0, 2, -2).dequantize(), values.mT)
    with pytest.raises(NotImplementedError, match="permutation"):
        weight.permute(2, 1, 0)


@pytest.mark.parametrize("sizes", [5, 1, N, 100, [3, 4, 10], [N], [0, N]])
def test_split(sizes):
    weight = row_tensor(N, K)
    parts, expected = torch.split(weight, sizes), torch.split(weight.dequantize(), sizes)
    assert [part.shape for part in parts] == [part.shape for part in expected]
    assert all(torch.equal(a.dequantize(), b) for a, b in zip(parts, expected, strict=True))


def test_chunk():
    parts = step_tensor(N, K).chunk(3)
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), step_tensor(N, K).dequantize())


@pytest.mark.parametrize("sizes", [[3, 4], [10, 10], [-1, 18], 0, -3])
def test_a_split_that_does_not_add_up(sizes):
    with pytest.raises((ValueError, RuntimeError)):
        torch.split(step_tensor(N, K), sizes)


@pytest.mark.parametrize(
    "cut", [lambda w: w[:, 1:], lambda w: w[:, 0], lambda w: w[0], lambda w: w.split(7, dim=1)]
)
def test_other_cuts_are_refused_by_name(cut):
    with pytest.raises(NotImplementedError, match="StepTensor"):
        cut(step_tensor(N, K))


def test_a_whole_slice_of_any_dimension_is_the_weight():
    weight = step_tensor(N, K)
    for same in (weight[:], weight[:, :], weight[..., :]):
        assert torch.equal(same.codes, weight.codes)


def test_rows_cannot_be_cut_where_a_stored_tensor_lacks_them():
    """A tensor whose row_data are wrong says so instead of giving nonsense."""
    codes = step_tensor(N, K).codes
    weight = RowTensor(codes, torch.ones(1, 1), shape=(N, K), dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"'scale' is \(1, 1\) for a weight"):
        weight[3:]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_embedding(shape):
    """``F.embedding`` and ``nn.Embedding`` dequantize the rows that are asked for, and no other."""
    weight = row_tensor(N, K)
    indices = torch.randint(0, N, shape, generator=torch.Generator().manual_seed(0))
    expected = weight.dequantize()[indices]
    assert torch.equal(F.embedding(indices, weight), expected)
    module = nn.Embedding(N, K, padding_idx=2)
    module.weight = nn.Parameter(weight, requires_grad=False)
    assert torch.equal(module(indices), expected)
    assert torch.equal(module(indices.int()), expected)


def test_transposed_twice_is_the_weight():
    weight = step_tensor(N, K)
    turned = weight.t()
    assert isinstance(turned, TransposedWeight)
    assert turned.shape == (K, N)
    assert torch.equal(turned.dequantize(), weight.dequantize().t())
    for back in (turned.t(), turned.T, turned.mT, turned.transpose(0, 1), turned.permute(1, 0)):
        assert type(back) is StepTensor
        assert back.codes.data_ptr() == weight.codes.data_ptr()
    halved = turned.half()
    assert halved.dequantize().dtype == halved.t().dequantize().dtype == torch.float16


def test_a_transposed_square_weight_is_not_cut_the_wrong_way():
    """Its rows are the base's columns, which have the same size here."""
    turned = row_tensor(N, N).t()
    for cut in (lambda: turned[3:9], lambda: turned.split(5), lambda: F.embedding(torch.tensor([1]), turned)):
        with pytest.raises(NotImplementedError, match="TransposedWeight"):
            cut()


class Graphs:
    """Counts what torch.compile makes, and runs it through AOTAutograd."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.registry import lookup_backend

        self.count += 1
        return lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A tied head and embedding, a linear with a bias, a transposed product."""

    def __init__(self):
        super().__init__()
        self.head = linear_of(row_tensor(N, K), bias=False)
        self.up = linear_of(step_tensor(K, K))

    def forward(self, indices):
        x = self.up(F.embedding(indices, self.head.weight))
        return self.head(x) + x @ self.head.weight.t()


class SlicedBlock(Block):
    """Also a linear on some rows of a weight. torch.export (2.13) can't trace that, torch.compile can."""

    def forward(self, indices):
        x = F.embedding(indices, self.up.weight)  # [rows, K]
        parts = [F.linear(x, part) for part in self.head.weight.split([N - 3, 3])]
        return super().forward(indices) + torch.cat(parts, -1)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("grad", [True, False])
def test_compile_makes_one_graph_for_all_row_counts(grad):
    module, graphs = SlicedBlock(), Graphs()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=graphs)
    with torch.set_grad_enabled(grad):
        for rows in (2, 5, 33):
            indices = torch.arange(rows) % N
            torch.testing.assert_close(compiled(indices), module(indices), rtol=1e-6, atol=0)
    assert graphs.count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_gradients():
    module, x = linear_of(step_tensor(N, K)), whole(5, K).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert torch.equal(x.grad.double(), (module.weight.codes.double() / 2).sum(0).expand(5, K))
    assert torch.equal(module.bias.grad, torch.full((N,), 5.0))


@pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__,
    reason="torch's default backend needs g++, and does not quote a path with a space",
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_with_the_default_backend():
    """Two modules of one class and other numbers do not get each other's code."""
    for seed in (0, 1):
        module = linear_of(step_tensor(N, K, step=2.0**-seed, seed=seed))
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        with torch.no_grad():
            for rows in (2, 5, 33):
                x = whole(rows, K)
                assert torch.equal(compiled(x), exact(x, module.weight, module.bias).float())


def test_export_with_a_dynamic_row_count():
    module = Block()
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(module, (torch.arange(5),), dynamic_shapes=({0: rows},))
        for count in (2, 17, 33):
            indices = torch.arange(count) % N
            torch.testing.assert_close(program.module()(indices), module(indices), rtol=1e-6, atol=0)


def test_two_weights_hash_alike_only_if_their_metadata_is_the_same():
    """What torch.compile's cache on disk goes by."""
    base = step_tensor(N, K)._stable_hash_for_caching()
    assert step_tensor(N, K, seed=7)._stable_hash_for_caching() == base
    others = [
        step_tensor(N, K, step=0.25),
        step_tensor(N, K + 1),
        step_tensor(N, K, dtype=torch.bfloat16),
        step_tensor(N, K, extra=torch.ones(1)),
        step_tensor(N, K).t(),
        step_tensor(N, K).map(lambda codes: codes.int()),
    ]
    assert base not in {other._stable_hash_for_caching() for other in others}


def test_a_layout_without_rows_is_not_cut_in_silence():
    """No row data and no portable form: refused, where the codes would stay whole under a cut shape."""

    class Whole(StepTensor):
        row_data = ()

    codes = step_tensor(4, 6).codes
    weight = Whole(codes, None, shape=(4, 6), dtype=torch.float32, step=0.5)
    with pytest.raises(NotImplementedError, match=r"Whole can.t be cut along dimension 0: its row_data"):
        weight[1:3]
