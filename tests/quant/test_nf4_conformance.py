"""The scheme nf4 against the kit."""

from __future__ import annotations

from ao_core.testing import parametrize_scheme_checks


@parametrize_scheme_checks("nf4", "nf4:double_quant=false", "nf4:block_size=32,scaler_block_size=2")
def test_scheme(check):
    check()
