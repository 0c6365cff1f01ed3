"""The conformance kit for kernels: a right one passes every check, and each kind of mistake fails its own."""

from __future__ import annotations

import re

import pytest
import torch
from kit_subjects import CPU, kernel_of, reference, right_kernel

from ao_core.testing import KERNEL_CHECKS, poisoned_memory

pytestmark = pytest.mark.usefixtures("plain_environment", "forgotten")


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
