"""The conformance kit for schemes: a right one passes every check, and each kind of mistake fails its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from kit_subjects import CPU, Right, RightTensor, register

import ao_core as ao
from ao_core.testing import SCHEME_CHECKS

pytestmark = pytest.mark.usefixtures("plain_environment", "forgotten")


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
