"""The float8 schemes against the kit."""

from __future__ import annotations

from ao_core.testing import parametrize_scheme_checks


@parametrize_scheme_checks(
    "float8-weight-only",
    "float8-weight-only:granularity=tensor",
    "float8-dynamic",
    "float8-dynamic:granularity=tensor",
)
def test_scheme(check):
    check()
