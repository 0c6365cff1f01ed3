"""The conformance kit: what every scheme and every kernel must do, as plain functions.

A plugin's test file::

    from ao_core.testing import parametrize_scheme_checks

    @parametrize_scheme_checks("ternary")
    def test_conformance(check): check()

Each check can also be called by hand, such as ``check_bias(scheme, torch.device("cpu"))``.
"""

from __future__ import annotations

from ao_core.testing.kernels import KERNEL_CHECKS, poisoned_memory
from ao_core.testing.parametrize import parametrize_kernel_checks, parametrize_scheme_checks
from ao_core.testing.storage import STORAGE_CHECKS
from ao_core.testing.values import VALUE_CHECKS

SCHEME_CHECKS = {check.__name__: check for check in (*VALUE_CHECKS, *STORAGE_CHECKS)}
"""Every scheme check by name: functions of ``(scheme, device)`` that raise if it fails."""

__all__ = [
    "KERNEL_CHECKS",
    "SCHEME_CHECKS",
    "parametrize_kernel_checks",
    "parametrize_scheme_checks",
    "poisoned_memory",
]
