"""Turning checks into pytest test ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from ao_core.ops import OPS
from ao_core.scheme import Scheme, parse_scheme
from ao_core.testing.kernels import KERNEL_CHECKS, kernels_of
from ao_core.testing.storage import STORAGE_CHECKS
from ao_core.testing.values import VALUE_CHECKS, fitting

Case = tuple[str, str, Callable[[], None]]
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def devices() -> list[torch.device]:
    """The CPU, and the CUDA device where there is one."""
    return [torch.device(name) for name in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]]


def parametrize_scheme_checks(
    *schemes: str | Scheme,
    expected_failures: Mapping[str, str] | None = None,
    fit: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Decorator:
    """Run a test once for every scheme, check and device, with a ``check`` to call.

    Args:
        *schemes: names or texts such as ``"int8-weight-only:group_size=64"``, or schemes.
        expected_failures: check name → why it fails. Strict: passing all the same is a failure.
        fit: what to do to random weights ``[..., N, K]`` before they are quantized, for schemes that refuse
            some values.
    """
    cases: list[Case] = [
        (
            f"{scheme}-{check.__name__}-{device}",
            check.__name__,
            partial(_fitted, fit, check, parse_scheme(scheme), device),
        )
        for scheme in schemes
        for check in (*VALUE_CHECKS, *STORAGE_CHECKS)
        for device in devices()
    ]
    known = {check.__name__ for check in (*VALUE_CHECKS, *STORAGE_CHECKS)}
    return _parametrize(cases, known, expected_failures)


def parametrize_kernel_checks(*ops: str, expected_failures: Mapping[str, str] | None = None) -> Decorator:
    """Run a test once for every kernel of the ops, check and device, with a ``check`` to call.

    A kernel that rejects all of an op's samples on a device is not run there.

    Args:
        *ops: op names.
        expected_failures: check name → why it fails. Strict.

    Raises:
        UnknownNameError: no installed plugin defines the op.
        ValueError: the op has no kernel.
    """
    if bare := [op for op in ops if not list(kernels_of(OPS.get(op).name))]:
        raise ValueError(f"{', '.join(bare)} has no kernel besides its reference: nothing to check.")
    cases: list[Case] = [
        (f"{op.name}-{kernel.provider}-{name}-{device}", name, partial(check, op, kernel, device))
        for op_name in ops
        for op, kernel in kernels_of(op_name)
        for device in _runs_on(op, kernel)
        for name, check in KERNEL_CHECKS.items()
    ]
    return _parametrize(cases, set(KERNEL_CHECKS), expected_failures)


def _fitted(
    fit: Callable[[torch.Tensor], torch.Tensor] | None,
    check: Callable[[Scheme, torch.device], None],
    scheme: Scheme,
    device: torch.device,
) -> None:
    with fitting(fit) if fit is not None else nullcontext():
        check(scheme, device)


def _runs_on(op: Any, kernel: Any) -> Iterator[torch.device]:
    from ao_core.kernels import key_of

    for device in devices():
        if any(kernel.rejects(key_of(op, args)) is None for args in op.samples(device)):
            yield device


def _parametrize(cases: list[Case], known: set[str], expected: Mapping[str, str] | None) -> Decorator:
    import pytest

    if unknown := sorted(set(expected or {}) - known):
        raise ValueError(f"expected_failures names no check: {unknown}. There are {sorted(known)}.")
    params = [
        pytest.param(
            run,
            id=identity,
            marks=[pytest.mark.xfail(reason=expected[name], strict=True)]
            if expected and name in expected
            else [],
        )
        for identity, name, run in cases
    ]
    decorator: Decorator = pytest.mark.parametrize("check", params)
    return decorator
