"""Scheme checks about numbers: what a quantized weight computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F

from ao_core.metrics import sqnr
from ao_core.scheme import Scheme
from ao_core.tensor import QuantizedTensor

SIZES = ((1, 1), (1, 17), (17, 1), (63, 100), (100, 63), (8, 576), (576, 17))  # (N, K)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LINEAR_SQNR = {torch.float32: 80.0, torch.bfloat16: 42.0, torch.float16: 42.0}


_fit: ContextVar[Callable[[torch.Tensor], torch.Tensor] | None] = ContextVar("fit", default=None)


def fitted(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` as the scheme that is checked takes it: see :func:`parametrize_scheme_checks`."""
    fit = _fit.get()
    return weight if fit is None or weight.ndim < 2 else fit(weight)


@contextmanager
def fitting(fit: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let :func:`fitted` be ``fit`` inside the block."""
    token = _fit.set(fit)
    try:
        yield
    finally:
        _fit.reset(token)


def gaussian(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal values, the same on every device, :func:`fitted` where there are rows and columns."""
    generator = torch.Generator().manual_seed(sum(shape))
    return fitted(torch.randn(*shape, generator=generator)).to(device, dtype)


def assert_linear(
    scheme: Scheme, quantized: QuantizedTensor, x: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """``F.linear`` on ``quantized`` is close to float64 arithmetic on its dequantized values."""
    out = F.linear(x, quantized, bias)
    wide_bias = None if bias is None else bias.double()
    expected = F.linear(x.double(), quantized.dequantize().double(), wide_bias)
    assert out.shape == expected.shape, f"shape {tuple(out.shape)}, expected {tuple(expected.shape)}"
    assert out.dtype == x.dtype, f"dtype {out.dtype}, expected {x.dtype}"
    if expected.numel() and expected.abs().max() > 0:
        needed = min(_LINEAR_SQNR[x.dtype], scheme.min_linear_sqnr)
        found = sqnr(expected, out)
        assert found >= needed, f"SQNR {found:.1f} dB of the linear's result, needed {needed} dB"


def check_shape_and_dtype_kept(scheme: Scheme, device: torch.device) -> None:
    """The quantized weight looks like the float one, and so does what it dequantizes to."""
    for dtype in DTYPES:
        for n, k in SIZES:
            weight = gaussian(n, k, device=device, dtype=dtype)
            quantized = scheme.quantize(weight)
            for tensor in (quantized, quantized.dequantize()):
                found = (tensor.shape, tensor.dtype, tensor.device)
                assert found == (weight.shape, dtype, weight.device), f"{found} for {(n, k)} {dtype}"
            assert not quantized.requires_grad, "a quantized weight must not require grad"


def check_linear_equals_dequantized_linear(scheme: Scheme, device: torch.device) -> None:
    """``F.linear`` computes what the dequantized weight would, in every dtype, for few and many rows."""
    for dtype in DTYPES:
        quantized = scheme.quantize(gaussian(100, 576, device=device, dtype=dtype))
        for rows in (1, 2, 17, 100):
            assert_linear(scheme, quantized, gaussian(rows, 576, device=device, dtype=dtype))


def check_odd_sizes(scheme: Scheme, device: torch.device) -> None:
    """Sizes that no tile divides."""
    for dtype in DTYPES:
        for n, k in SIZES:
            quantized = scheme.quantize(gaussian(n, k, device=device, dtype=dtype))
            assert_linear(scheme, quantized, gaussian(3, k, device=device, dtype=dtype))


def check_bias(scheme: Scheme, device: torch.device) -> None:
    """A bias is added."""
    for dtype in DTYPES:
        quantized = scheme.quantize(gaussian(63, 100, device=device, dtype=dtype))
        for rows in (1, 40):
            x = gaussian(rows, 100, device=device, dtype=dtype)
            assert_linear(scheme, quantized, x, 10 * gaussian(63, device=device, dtype=dtype))


def check_empty_batch(scheme: Scheme, device: torch.device) -> None:
    """No rows in, no rows out."""
    quantized = scheme.quantize(gaussian(17, 100, device=device))
    for shape in ((0, 100), (2, 0, 100)):
        out = F.linear(torch.empty(shape, device=device), quantized)
        assert out.shape == (*shape[:-1], 17), f"{tuple(out.shape)} for an input {shape}"


def check_input_ranks(scheme: Scheme, device: torch.device) -> None:
    """Inputs of one to four dimensions."""
    quantized = scheme.quantize(gaussian(17, 100, device=device))
    for shape in ((100,), (3, 100), (2, 3, 100), (2, 1, 3, 100)):
        assert_linear(scheme, quantized, gaussian(*shape, device=device))


def check_non_contiguous_input(scheme: Scheme, device: torch.device) -> None:
    """Inputs with strides, and a weight with strides."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = fitted(gaussian(100, 17, device=device, dtype=dtype).t())
        quantized = scheme.quantize(weight.t().contiguous().t())
        base = gaussian(5, 200, device=device, dtype=dtype)
        for x in (base[:, ::2], gaussian(100, 5, device=device, dtype=dtype).t(), base[:, 100:]):
            assert_linear(scheme, quantized, x)


def check_no_aliasing(scheme: Scheme, device: torch.device) -> None:
    """Overwriting the float weight afterwards changes nothing, and quantizing leaves it as it was."""
    weight = gaussian(17, 100, device=device)
    before = weight.clone()
    quantized = scheme.quantize(weight)
    assert torch.equal(weight, before), "quantize() changed the float weight"
    values = quantized.dequantize().clone()
    weight.fill_(7)
    assert torch.equal(quantized.dequantize(), values), "the quantized weight shares memory with it"


def check_min_sqnr(scheme: Scheme, device: torch.device) -> None:
    """A Gaussian weight keeps the declared signal-to-noise ratio."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = gaussian(100, 576, device=device, dtype=dtype)
        found = sqnr(weight, scheme.quantize(weight).dequantize())
        assert found >= scheme.min_sqnr, f"{found:.1f} dB, declared {scheme.min_sqnr} dB"


def check_degenerate_rows(scheme: Scheme, device: torch.device) -> None:
    """Zero, constant, tiny and outlier rows give finite values; zeros stay zero."""
    weight = gaussian(6, 100, device=device)
    weight[0] = 0
    weight[1] = 3
    weight[2] = -1e-30
    weight[3, 7] = 1e4
    weight[4, 1:] = 0
    weight = fitted(weight)
    for dtype in DTYPES:
        quantized = scheme.quantize(weight.to(dtype))
        values = quantized.dequantize()
        assert torch.isfinite(values).all(), "dequantize() gives NaN or infinity"
        assert not values[0].any(), "a row of zeros does not stay zero"
        out = F.linear(torch.ones(2, 100, device=device, dtype=dtype), quantized)
        assert torch.isfinite(out).all(), "linear gives NaN or infinity"


def check_non_finite_refused(scheme: Scheme, device: torch.device) -> None:
    """Weights with NaN or infinity are refused."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        weight = gaussian(17, 100, device=device)
        weight[3, 5] = bad
        _assert_refused(scheme, weight, "NaN")


def check_rejections_are_raised(scheme: Scheme, device: torch.device) -> None:
    """``quantize`` raises the very reason that ``rejects`` gives."""
    weight = gaussian(16, 64, device=device)
    for bad in (
        weight.double(),
        weight.to(torch.int8),
        weight.to(torch.complex64),
        weight.to("meta"),
        weight[0],
        weight[:0],
        scheme.quantize(weight),
    ):
        reason = scheme.rejects(bad)
        assert isinstance(reason, str) and reason, f"rejects() has no reason against {bad.dtype} {bad.shape}"
        _assert_refused(scheme, bad, reason)


def check_columns_encode_alone(scheme: Scheme, device: torch.device) -> None:
    """``decode(encode(w))`` is what is stored; one group of columns gives the same as all at once."""
    weight = gaussian(17, 100, device=device)
    qparams = scheme.choose_qparams(weight)
    codes = scheme.encode(weight, qparams)
    assert codes.shape == weight.shape, f"codes are {tuple(codes.shape)} for {tuple(weight.shape)}"
    assert not codes.is_floating_point(), f"codes are {codes.dtype}, not integers"
    decoded = scheme.decode(codes, qparams)
    torch.testing.assert_close(decoded, scheme.quantize(weight).dequantize(), rtol=1e-6, atol=0)
    size = 100 if scheme.group_columns == -1 else min(scheme.group_columns, 100)
    for name, value in qparams.items():
        assert value.shape[-1] == -(-100 // size), (
            f"{name} is {tuple(value.shape)} for groups of {size} columns"
        )
    for column in (0, 63, 99):
        group = column // size
        own = {name: value[..., group : group + 1] for name, value in qparams.items()}
        part = scheme.encode(weight[:, column : column + 1], own)
        assert torch.equal(part, codes[:, column : column + 1]), f"column {column} alone differs"


def check_gradient(scheme: Scheme, device: torch.device) -> None:
    """The activations' gradient is that of the dequantized weight; the weight has none."""
    quantized = scheme.quantize(gaussian(17, 100, device=device))
    x = gaussian(3, 100, device=device).requires_grad_()
    upstream = gaussian(3, 17, device=device)
    F.linear(x, quantized).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ quantized.dequantize())


def check_result_is_its_own(scheme: Scheme, device: torch.device) -> None:
    """A result can be written into, with its gradient, and no later result is changed by that."""
    quantized = scheme.quantize(gaussian(17, 100, device=device))
    for rows in ((3,), (2, 3)):
        x = gaussian(*rows, 100, device=device).requires_grad_()
        upstream = gaussian(*rows, 17, device=device)
        before = F.linear(x, quantized).detach().clone()
        out = F.linear(x, quantized)
        out *= upstream
        assert torch.equal(out, before * upstream), f"an input {tuple(x.shape)} has another result"
        out.backward(upstream)
        torch.testing.assert_close(x.grad, upstream**2 @ quantized.dequantize())
        assert torch.equal(F.linear(x, quantized), before), "a result is written into by a later one"


def check_rows(scheme: Scheme, device: torch.device) -> None:
    """Slices, splits and look-ups of rows are those of the dequantized weight, or say they can't."""
    quantized = scheme.quantize(gaussian(17, 100, device=device))
    values = quantized.dequantize()
    indices = torch.tensor([[0, 16], [5, 5]], device=device)
    try:
        assert torch.equal(quantized[3:9].dequantize(), values[3:9]), "a slice of rows differs"
        parts = torch.split(quantized, 5)
        assert [part.shape[0] for part in parts] == [5, 5, 5, 2], "a split has other parts"
        found, expected = F.embedding(indices, quantized), F.embedding(indices, values)
        assert torch.equal(found, expected), "a look-up of rows differs"
    except NotImplementedError as error:
        assert type(quantized).__name__ in str(error), "the refusal must name the class"


def check_expert_stack(scheme: Scheme, device: torch.device) -> None:
    """A stack ``[E, N, K]`` is indexed, selected and multiplied as its experts are, or says it can't."""
    quantized = scheme.quantize(gaussian(3, 17, 100, device=device))
    values = quantized.dequantize()
    assert values.shape == (3, 17, 100), f"a stack (3, 17, 100) dequantizes to {tuple(values.shape)}"
    x = gaussian(3, 5, 100, device=device)
    try:
        for index, expert in enumerate(quantized.unbind(0)):
            assert torch.equal(quantized[index].dequantize(), values[index]), f"expert {index} differs"
            assert_linear(scheme, expert, x[index])  # type: ignore[arg-type]
        chosen = torch.tensor([2, 0, 2], device=device)
        assert torch.equal(quantized[chosen].dequantize(), values[chosen]), "chosen experts differ"
        together = torch.bmm(x, quantized.transpose(-2, -1))
        apart = torch.stack([F.linear(x[index], quantized[index]) for index in range(3)])
        torch.testing.assert_close(together, apart)
    except NotImplementedError as error:
        assert type(quantized).__name__ in str(error), "the refusal must name the class"


def check_grouped_matmul(scheme: Scheme, device: torch.device) -> None:
    """``torch._grouped_mm`` gives each expert of a stack its rows; one expert here has none."""
    if not hasattr(torch, "_grouped_mm"):
        return
    quantized = scheme.quantize(gaussian(3, 16, 64, device=device, dtype=torch.bfloat16))
    x = gaussian(24, 64, device=device, dtype=torch.bfloat16)
    offsets = torch.tensor([8, 8, 24], dtype=torch.int32, device=device)
    try:
        found = torch._grouped_mm(x, quantized.transpose(-2, -1), offs=offsets)
        for index, rows in ((0, slice(0, 8)), (2, slice(8, 24))):
            expected = F.linear(x[rows].double(), quantized[index].dequantize().double())
            needed = min(_LINEAR_SQNR[torch.bfloat16], scheme.min_linear_sqnr)
            assert sqnr(expected, found[rows]) >= needed, f"expert {index} differs"
    except NotImplementedError as error:
        assert type(quantized).__name__ in str(error), "the refusal must name the class"


def check_slices(scheme: Scheme, device: torch.device) -> None:
    """A scheme that says it is ``rowwise`` gives slices of a weight what it gives the whole."""
    if not scheme.rowwise:
        return
    for weight in (gaussian(40, 100, device=device), gaussian(4, 7, 100, device=device)):
        quantized, part = scheme.quantize(weight), scheme.quantize(weight[1:3])
        assert torch.equal(quantized[1:3].dequantize(), part.dequantize()), "a slice is quantized otherwise"
        assert all(data.shape[0] == weight.shape[0] for data in quantized.portable().stored().values()), (
            "rowwise, and a stored tensor does not have the first dimension"
        )


def check_transposed_matmul(scheme: Scheme, device: torch.device) -> None:
    """``x @ weight.t()`` is ``F.linear(x, weight)``."""
    quantized = scheme.quantize(gaussian(17, 100, device=device))
    x = gaussian(3, 100, device=device)
    torch.testing.assert_close(x @ quantized.t(), F.linear(x, quantized))
    same = torch.equal(quantized.t().dequantize(), quantized.dequantize().t())
    assert same, "the transposed weight dequantizes to something else"


def _assert_refused(scheme: Scheme, weight: torch.Tensor, text: str) -> None:
    try:
        scheme.quantize(weight)
    except ValueError as error:
        assert text in str(error), f"the error {str(error)!r} does not say {text!r}"
    else:
        raise AssertionError(f"quantize() took a weight {weight.dtype} {tuple(weight.shape)}: {text}")


VALUE_CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
