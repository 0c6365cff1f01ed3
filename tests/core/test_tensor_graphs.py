"""Quantized weights in torch.compile and torch.export."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from tensor_kinds import K, N, StepTensor, exact, linear_of, row_tensor, step_tensor, whole
from torch import nn


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


@contextlib.contextmanager
def counted(*names):
    """The calls of these methods of StepTensor, by name."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(StepTensor, name, noted(getattr(StepTensor, name), calls))
        yield calls


def noted(method, calls):
    def run(weight):
        calls.append(method.__name__)
        return method(weight)

    return run


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


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("shape", [(5, K), (2, 3, K)])
def test_compiled_results_can_be_written_into(shape):
    module, x = linear_of(step_tensor(N, K)), whole(*shape).requires_grad_()
    compiled = torch.compile(
        lambda x: module(x).add_(1).mul_(2), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (x, whole(7, *shape[1:])):
        assert torch.equal(compiled(rows), 2 * exact(rows, module.weight, module.bias).float() + 2)
    compiled(x).sum().backward()
    assert torch.equal(x.grad.double(), module.weight.codes.double().sum(0).expand(shape))


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


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("name", "value"), [("step", 0.25), ("provider", "reference"), ("scheme", "finer")], ids=str
)
@torch.no_grad()
def test_another_attribute_is_another_graph(name, value):
    """Also after calls that kept the flattened weight; the first graph is used again with the first value."""
    module, graphs, x = linear_of(step_tensor(N, K)), Graphs(), whole(5, K)
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    before = getattr(module.weight, name)
    for given, count in ((before, 1), (value, 2), (before, 2), (value, 2)):
        setattr(module.weight, name, given)
        for _ in range(2):
            assert torch.equal(compiled(x), exact(x, module.weight, module.bias).float())
        assert graphs.count == count


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_another_kind_of_weight_is_another_graph():
    module, graphs, x = linear_of(step_tensor(N, K), bias=False), Graphs(), whole(5, K)
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    others = (step_tensor(N, K), row_tensor(N, K), step_tensor(N, K, extra=torch.ones(1)))
    for other, count in zip(others, (1, 2, 3), strict=True):
        module.weight = nn.Parameter(other, requires_grad=False)
        torch.testing.assert_close(compiled(x), module(x))
        assert graphs.count == count


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_a_compiled_call_builds_nothing_of_a_weight():
    """It asks for what is kept: guards and the unwrapping of each weight are time of the host."""
    module, x = nn.Sequential(*(linear_of(step_tensor(K, K)) for _ in range(3))), whole(5, K)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(x)
    with counted("__tensor_flatten__") as asked, counted("stored", "attributes", "_outer") as built:
        compiled(x)
        assert len(asked) >= len(module) and not built
        module[0].weight.scheme = "another"
        compiled(x)
        assert {"stored", "attributes"} <= set(built)


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
