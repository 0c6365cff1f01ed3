"""The kit's checks as test ids, in a stranger's tests too."""

from __future__ import annotations

import pytest
from kit_subjects import Right, kernel_of, register, right_kernel

import ao_core as ao
from ao_core.kernels import KERNELS
from ao_core.testing import (
    KERNEL_CHECKS,
    SCHEME_CHECKS,
    parametrize_kernel_checks,
    parametrize_scheme_checks,
)
from ao_core.testing.parametrize import devices

pytestmark = pytest.mark.usefixtures("plain_environment", "forgotten")


def cases(decorator):
    """The parameters that a decorator of the kit makes, by id."""
    return {param.id: param for param in decorator.args[1]}


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
