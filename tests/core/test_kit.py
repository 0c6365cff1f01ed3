"""The conformance kit: what is right passes every check, and each kind of mistake fails its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch

import ao_core as ao
from ao_core import plugins, registry
from ao_core.kernels import KERNELS, clear_choices
from ao_core.ops import OPS
from ao_core.scheme import SCHEMES
from ao_core.testing import (
    KERNEL_CHECKS,
    SCHEME_CHECKS,
    parametrize_kernel_checks,
    parametrize_scheme_checks,
    poisoned_memory,
)
from ao_core.testing.parametrize import devices

SOURCE = registry.Source("tests", "tests", "1")
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("plain_environment", "forgotten")


@pytest.fixture
def forgotten():
    """What a test registers is gone afterwards."""
    plugins.load()
    yield
    plugins.reset()


def cases(decorator):
    """The parameters that a decorator of the kit makes, by id."""
    return {param.id: param for param in decorator.args[1]}


class RightTensor(ao.QuantizedTensor):
    data_names = ("codes", "scale")
    attr_names = ("levels", "block")

    def dequantize(self):
        return (self.codes.float() * self.scale).to(self.dtype)


@dataclass(frozen=True)
class Right(ao.Scheme):
    """Symmetric int8, one scale a row, written without ao_core.numerics."""

    name: ClassVar[str] = "right"
    tensor_types = (RightTensor,)
    min_sqnr: ClassVar[float] = 40.0

    levels: int = 127
    block: tuple[int, int] = (1, -1)

    def choose_qparams(self, weight):
        largest = weight.float().abs().amax(-1, keepdim=True)
        return {"scale": (largest / self.levels).clamp_min(1e-12)}

    def encode(self, weight, qparams):
        codes = (weight.float() / qparams["scale"]).round()
        return codes.clamp(-self.levels, self.levels).to(torch.int8)

    def decode(self, codes, qparams):
        return codes.float() * qparams["scale"]

    def pack(self, codes, qparams, *, dtype):
        (kind,) = self.tensor_types
        return kind(codes, qparams["scale"], shape=codes.shape, dtype=dtype, **vars(self))


def register(kind):
    SCHEMES.add(kind.name, kind, SOURCE)
    return kind()


@pytest.mark.parametrize("name", SCHEME_CHECKS)
def test_a_right_scheme_passes(name):
    SCHEME_CHECKS[name](register(Right), CPU)


def scheme_with(**members):
    """The right scheme with some members changed."""
    kind = type("Wrong", (Right,), {"__doc__": "Wrong.", "name": "wrong", **members})
    return register(dataclass(frozen=True)(kind))


def tensor_with(**members):
    """The right scheme with some members of its tensor class changed."""
    return scheme_with(tensor_types=(type("WrongTensor", (RightTensor,), members),))


def linear_with(change):
    """The right scheme with another linear: ``change(linear, x, bias)``."""
    return tensor_with(linear=lambda self, x, bias: change(partial(RightTensor.linear, self), x, bias))


def stores_the_weight_itself():
    tensor = type(
        "WrongTensor",
        (RightTensor,),
        {"dequantize": lambda self: self.codes.view(torch.float32).to(self.dtype)},
    )
    return scheme_with(encode=lambda self, weight, qparams: weight.view(torch.int32), tensor_types=(tensor,))


def changes_the_weight():
    return scheme_with(choose_qparams=lambda self, weight: Right.choose_qparams(self, weight.clamp_(-2, 2)))


def keeps_its_results():
    kept = {}
    return linear_with(lambda linear, x, bias: kept.setdefault(x.shape, linear(x, bias)))


def divides_by_zero():
    def choose_qparams(self, weight):
        largest = weight.float().abs().amax(-1, keepdim=True)
        return {"scale": largest * largest / largest / self.levels}

    return scheme_with(choose_qparams=choose_qparams)


def scales_each_column_alone():
    return scheme_with(encode=lambda self, w, qparams: Right.encode(self, w, self.choose_qparams(w)))


def takes_anything():
    def quantize(self, weight, *, provider=None):
        qparams = self.choose_qparams(weight)
        return self.pack(self.encode(weight, qparams), qparams, dtype=weight.dtype)

    return scheme_with(quantize=quantize)


def hides_the_reason():
    def quantize(self, weight, *, provider=None):
        if self.rejects(weight):
            raise ao.RejectedError("no")
        return Right.quantize(self, weight)

    return scheme_with(quantize=quantize)


WRONG_SCHEMES = {
    "stores the weight itself": ("check_no_aliasing", stores_the_weight_itself),
    "changes the weight": ("check_no_aliasing", changes_the_weight),
    "declares more than it keeps": ("check_min_sqnr", lambda: scheme_with(min_sqnr=55.0)),
    "has fewer levels than it declares": (
        "check_min_sqnr",
        lambda: scheme_with(encode=lambda self, w, qparams: Right.encode(self, w, qparams) // 16 * 16),
    ),
    "returns float32": (
        "check_linear_equals_dequantized_linear",
        lambda: linear_with(lambda linear, x, bias: linear(x, bias).float()),
    ),
    "computes something else": (
        "check_odd_sizes",
        lambda: linear_with(lambda linear, x, bias: linear(x, bias) * 1.01),
    ),
    "forgets the bias": ("check_bias", lambda: linear_with(lambda linear, x, bias: linear(x, None))),
    "flattens its input": (
        "check_input_ranks",
        lambda: linear_with(lambda linear, x, bias: linear(x.reshape(-1, x.shape[-1]), bias)),
    ),
    "makes up rows": (
        "check_empty_batch",
        lambda: linear_with(lambda linear, x, bias: linear(x if len(x) else x.new_ones(1, 100), bias)),
    ),
    "ignores strides": (
        "check_non_contiguous_input",
        lambda: linear_with(lambda linear, x, bias: linear(x.as_strided(x.shape, (x.shape[1], 1)), bias)),
    ),
    "dequantizes to float32": (
        "check_shape_and_dtype_kept",
        lambda: tensor_with(dequantize=lambda self: self.codes.float() * self.scale),
    ),
    "is not smaller": (
        "check_smaller",
        lambda: scheme_with(encode=lambda self, w, qparams: Right.encode(self, w, qparams).int()),
    ),
    "returns the same memory again": ("check_result_is_its_own", keeps_its_results),
    "divides by zero": ("check_degenerate_rows", divides_by_zero),
    "takes NaN": ("check_non_finite_refused", takes_anything),
    "hides its reason": ("check_rejections_are_raised", hides_the_reason),
    "scales each column alone": ("check_columns_encode_alone", scales_each_column_alone),
    "forgets an option": (
        "check_options_round_trip",
        lambda: scheme_with(from_dict=classmethod(lambda cls, data: cls(levels=3))),
    ),
    "forgets an attribute": (
        "check_flatten_round_trip",
        lambda: tensor_with(attributes=lambda self: {"levels": self.levels + 1, "block": ()}),
    ),
    "clones to the same memory": (
        "check_copies",
        lambda: tensor_with(clone=lambda self: self.detach()),
    ),
    "compiles for each row count": (
        "check_compile",
        lambda: linear_with(lambda linear, x, bias: linear(x, bias) if len(x) > 8 else linear(x, bias) + 0),
    ),
}


@pytest.mark.parametrize("mistake", WRONG_SCHEMES)
def test_a_wrong_scheme_fails_its_check(mistake):
    check, make = WRONG_SCHEMES[mistake]
    with pytest.raises(AssertionError) as caught:
        SCHEME_CHECKS[check](make(), CPU)
    assert str(caught.value), "a failed check must say what it found"


def reference(x, weight):
    return x @ weight.t()


def samples(device):
    generator = torch.Generator().manual_seed(1)
    for rows, n, k in ((3, 7, 5), (1, 1, 63), (0, 7, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = (torch.randn(size, k, generator=generator) for size in (rows, n))
            yield x.to(device, dtype), weight.to(device, dtype)


def kernel_of(name, fn, **parts):
    """An op with one kernel, both registered."""
    fields = {
        "reference": reference,
        "fake": lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
        "samples": samples,
    }
    rejects = {"rejects": parts.pop("rejects")} if "rejects" in parts else {}
    op = ao.Op(name, "(Tensor x, Tensor weight) -> Tensor", **{**fields, **parts})
    kernel = ao.Kernel(name, "mine", fn, **rejects)
    OPS.add(name, op, SOURCE)
    KERNELS.add(f"{name}/mine", kernel, SOURCE)
    clear_choices()
    return op, kernel


def right_kernel(x, weight):
    return torch.einsum("mk,nk->mn", x, weight)


def unwritten(x, weight):
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    out[:, : weight.shape[0] - 1] = reference(x, weight)[:, :-1]
    return out


def in_place(x, weight):
    out = reference(x, weight)
    weight.mul_(1)
    x.add_(1)
    return out


def contiguous_only(x, weight):
    return reference(x.as_strided(x.shape, (x.shape[1], 1)), weight)


WRONG_KERNELS = {
    "wrong": ("check_equals_reference", lambda x, weight: reference(x, weight) * 1.1, "off by"),
    "float32": ("check_equals_reference", lambda x, w: reference(x, w).float(), "torch.float32 for"),
    "transposed": ("check_equals_reference", lambda x, weight: reference(weight, x), "for (3, 7)"),
    "unwritten": ("check_equals_reference", unwritten, "not written"),
    "in_place": ("check_inputs_unchanged", in_place, "argument 0 was changed"),
    "identity": ("check_inputs_unchanged", lambda x, weight: x[:, :1], "argument 0 is returned"),
    "contiguous_only": ("check_non_contiguous", contiguous_only, "off by"),
}


@pytest.mark.parametrize("name", KERNEL_CHECKS)
def test_a_right_kernel_passes(name):
    """One that takes float32 only, too: the other samples are for its rejection."""
    op, kernel = kernel_of("kit_right", right_kernel)
    KERNEL_CHECKS[name](op, kernel, CPU)
    picky = kernel_of(
        "kit_picky",
        right_kernel,
        rejects=lambda key: None if key.dtype == torch.float32 else f"it takes float32, not {key.dtype}",
    )
    KERNEL_CHECKS[name](*picky, CPU)


@pytest.mark.parametrize("mistake", WRONG_KERNELS)
def test_a_wrong_kernel_fails_its_check(mistake):
    check, fn, words = WRONG_KERNELS[mistake]
    with pytest.raises(AssertionError, match=re.escape(words)):
        KERNEL_CHECKS[check](*kernel_of(f"kit_{mistake}", fn), CPU)


@pytest.mark.parametrize("name", ["check_equals_reference", "check_non_contiguous"])
def test_kernels_run_in_poisoned_memory(name):
    """Else what happens to lie there could pass for a result."""
    poisoned = []

    def kernel(x, weight):
        poisoned.append(torch.empty(x.shape[0], weight.shape[0]).isnan().all())
        return reference(x, weight)

    KERNEL_CHECKS[name](*kernel_of("kit_poisoned", kernel), CPU)
    assert poisoned and all(poisoned)


@pytest.mark.parametrize(
    ("name", "fake"),
    [
        ("kit_fake_shape", lambda x, weight: x.new_empty(x.shape[0], x.shape[1])),
        ("kit_fake_dtype", lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]).double()),
    ],
)
def test_a_wrong_fake_is_caught(name, fake):
    with pytest.raises(Exception, match=r"(?i)mismatch|not match|differ"):
        KERNEL_CHECKS["check_opcheck"](*kernel_of(name, right_kernel, fake=fake), CPU)


def test_a_kernel_that_takes_no_sample_is_not_checked_silently():
    with pytest.raises(AssertionError, match="rejects every sample"):
        KERNEL_CHECKS["check_equals_reference"](
            *kernel_of("kit_refuses_all", right_kernel, rejects=lambda key: "never"), CPU
        )


def test_an_empty_reason_is_caught():
    with pytest.raises(AssertionError, match="an empty reason"):
        KERNEL_CHECKS["check_rejections"](
            *kernel_of("kit_no_reason", right_kernel, rejects=lambda key: ""), CPU
        )


def test_poison_is_put_back():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.empty(3, dtype=torch.int8).eq(127).all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_scheme_checks_become_test_ids():
    register(Right)
    made = cases(parametrize_scheme_checks("right:levels=63", Right(levels=100)))
    for name in SCHEME_CHECKS:
        assert f"right:levels=63-{name}-cpu" in made
    made["right:levels=100-check_bias-cpu"].values[0]()
    (made,) = cases(parametrize_scheme_checks("right", expected_failures={"check_bias": "why"}))[
        "right-check_bias-cpu"
    ].marks
    assert made.kwargs == {"reason": "why", "strict": True}


def test_kernel_checks_become_test_ids():
    kernel_of("kit_ids", right_kernel)
    made = cases(parametrize_kernel_checks("kit_ids"))
    assert set(made) == {f"kit_ids-mine-{name}-{device}" for name in KERNEL_CHECKS for device in devices()}
    for case in made.values():
        case.values[0]()


def test_a_kernel_for_another_device_is_not_run_here():
    """Nor is its expected failure taken for a misspelt one."""
    kernel_of("kit_elsewhere", right_kernel, rejects=lambda key: "it runs on a toaster")
    expected = {"check_opcheck": "toasters have no tracing"}
    assert cases(parametrize_kernel_checks("kit_elsewhere", expected_failures=expected)) == {}


def test_unknown_names_are_refused():
    """An op, a scheme or a check that is misspelt must not pass as an empty test."""
    kernel_of("kit_known", right_kernel)
    register(Right)
    with pytest.raises(ao.UnknownNameError, match="kit_knwon"):
        parametrize_kernel_checks("kit_knwon")
    with pytest.raises(ao.UnknownNameError, match="rihgt"):
        parametrize_scheme_checks("rihgt")
    for parametrize, name in ((parametrize_kernel_checks, "kit_known"), (parametrize_scheme_checks, "right")):
        with pytest.raises(ValueError, match=r"names no check: \['check_nothing'\]"):
            parametrize(name, expected_failures={"check_nothing": "because"})
    KERNELS.clear()
    with pytest.raises(ValueError, match="kit_known has no kernel"):
        parametrize_kernel_checks("kit_known")


STRANGER = """
@ao.hookimpl
def ao_register_ops():
    return [OP]

@ao.hookimpl
def ao_register_kernels():
    return [ao.Kernel("stranger", "mine", lambda x, weight: torch.einsum("mk,nk->mn", x, weight))]

OP = ao.Op(
    "stranger", "(Tensor x, Tensor weight) -> Tensor",
    reference=lambda x, weight: x @ weight.t(),
    fake=lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
    samples=lambda device: [(torch.randn(3, 5, device=device), torch.randn(7, 5, device=device))],
)
"""
CONFORMANCE = """
from ao_core.testing import parametrize_kernel_checks, parametrize_scheme_checks

@parametrize_kernel_checks("stranger")
def test_kernel(check): check()

@parametrize_scheme_checks("whole", expected_failures={"check_bias": "passes all the same"})
def test_scheme(check): check()
"""


def test_a_strangers_conformance_test(site, run_python, tmp_path):
    """Its kernel passes; an expected failure that passes is a failure, by its name."""
    module = site.install_scheme("stranger", "whole")
    module.write_text(module.read_text() + STRANGER)
    (tmp_path / "test_stranger.py").write_text(CONFORMANCE)
    done = run_python(
        "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))",
        *(
            "test_stranger.py",
            "-q",
            "-rfEp",
            "-p",
            "no:cacheprovider",
            "-k",
            "cpu and (kernel or check_bias or 4-D)",
        ),
    )
    assert done.returncode == 1, done.stdout
    assert done.stdout.count("PASSED") == len(KERNEL_CHECKS)
    assert done.stdout.count("FAILED") == 1
    assert "[XPASS(strict)] passes all the same" in done.stdout
