"""The 4-bit integer schemes keep every promise of a scheme, whatever their options."""

import pytest

import ao_core as ao
from ao_core.testing import parametrize_kernel_checks, parametrize_scheme_checks


@parametrize_scheme_checks(
    "int4-weight-only",
    "int4-weight-only:group_size=32,zero_point=integer,qparams=minmax",
    "int4-weight-only:group_size=64,zero_point=None",
    "int4-weight-only:group_size=-1,qparams=hqq",
    "int8-dynamic-int4-weight",
    "int8-dynamic-int4-weight:group_size=256,qparams=minmax",
    "uint4",
)
def test_conformance(check):
    check()


@parametrize_scheme_checks("int4-weight-only:group_size=32,zero_point=integer", "int4-weight-only")
def test_conformance_in_torchs_tiles(check, monkeypatch):
    """The same where torch's own kernel is chosen, and weights lie in its tiles."""
    monkeypatch.setenv("AO_KERNELS", "torch")
    check()


@parametrize_kernel_checks("int4_tiled_linear")
def test_kernels(check):
    check()


@pytest.mark.parametrize("group_size", [0, 7, 48, 512, -2, 1.5, True, "64"])
@pytest.mark.parametrize("name", ["int4-weight-only", "int8-dynamic-int4-weight"])
def test_a_group_size_that_is_not_offered(name, group_size):
    with pytest.raises(ao.OptionError, match=rf"{name} takes group_size 32, 64.*given {group_size!r}"):
        ao.parse_scheme(name, group_size=group_size)
