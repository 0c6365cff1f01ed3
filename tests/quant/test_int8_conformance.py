"""The int8 schemes and kernels against the kit."""

from __future__ import annotations

from ao_core.testing import parametrize_kernel_checks, parametrize_scheme_checks


@parametrize_scheme_checks("int8-weight-only", "int8-weight-only:group_size=64", "int8-dynamic")
def test_scheme(check):
    check()


@parametrize_kernel_checks("int8_weight_linear", "int8_dynamic_linear")
def test_kernel(check):
    check()
