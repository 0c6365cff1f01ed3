"""Kernel checks: a kernel computes what its op's reference does, or says why it can't."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ao_core.errors import RejectedError
from ao_core.kernels import KERNELS, Kernel, key_of, use_provider
from ao_core.ops import OPS, Op

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest ``|out - reference| / |reference|`` of a floating result; integers must be equal."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN (or the largest integer), so that what is not written shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]


def check_equals_reference(op: Op, kernel: Kernel, device: torch.device) -> None:
    """Equal to the reference on every sample that it takes; at least one is taken."""
    taken = 0
    for args in op.samples(device):
        if kernel.rejects(key_of(op, args)) is not None:
            continue
        taken += 1
        expected = op.reference(*args)
        with poisoned_memory():
            found = kernel.fn(*args)
        _assert_close(found, expected, _text(args))
    assert taken, f"{kernel.provider} rejects every sample of {op.name} on {device}"


def check_inputs_unchanged(op: Op, kernel: Kernel, device: torch.device) -> None:
    """No argument is written to, and none is returned."""
    for args in op.samples(device):
        if kernel.rejects(key_of(op, args)) is not None:
            continue
        before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        found = kernel.fn(*args)
        memory = {each.untyped_storage().data_ptr() for each in _tensors(found) if each.numel()}
        for index, (old, new) in enumerate(zip(before, args, strict=True)):
            if isinstance(old, torch.Tensor):
                assert torch.equal(old, new), f"argument {index} was changed: {_text(args)}"
                returned = new.untyped_storage().data_ptr() in memory
                assert not returned, f"argument {index} is returned: {_text(args)}"


def check_non_contiguous(op: Op, kernel: Kernel, device: torch.device) -> None:
    """Activations with strides give the same."""
    for args in op.samples(device):
        if kernel.rejects(key_of(op, args)) is not None:
            continue
        strided = [_strided(arg) if index < op.activations else arg for index, arg in enumerate(args)]
        with poisoned_memory():
            found = kernel.fn(*strided)
        _assert_close(found, op.reference(*args), _text(args))


def check_opcheck(op: Op, kernel: Kernel, device: torch.device) -> None:
    """``torch.library.opcheck`` passes: schema, fake, and tracing with dynamic shapes."""
    done: set[str] = set()
    for args in op.samples(device):
        key = key_of(op, args)
        if kernel.rejects(key) is None and str(key.dtype) not in done and args[0].numel():
            done.add(str(key.dtype))
            options = {"provider": kernel.provider}
            torch.library.opcheck(op.overload, args, options, test_utils=_opcheck_tests(args))


def check_rejections(op: Op, kernel: Kernel, device: torch.device) -> None:
    """A reason is a text, and forcing the kernel raises it."""
    for args in op.samples(device):
        reason = kernel.rejects(key_of(op, args))
        if reason is None:
            continue
        assert isinstance(reason, str) and reason, f"an empty reason: {_text(args)}"
        with use_provider(kernel.provider, op=op.name):
            try:
                op(*args)
            except RejectedError as error:
                assert reason in str(error), f"{str(error)!r} does not say {reason!r}"
            else:
                raise AssertionError(f"{kernel.provider} ran although it rejects: {reason}")


def kernels_of(op: str) -> Iterator[tuple[Op, Kernel]]:
    """The op called ``op`` with each kernel registered for it."""
    for entry in KERNELS.entries().values():
        if entry.item.op == op:
            yield OPS.get(op), entry.item


def _opcheck_tests(args: tuple[Any, ...]) -> tuple[str, ...]:
    """All of them; without the schema's for float8 arguments, which torch can't compare (2.13).

    What it would find, an argument that is written to or returned, ``check_inputs_unchanged`` finds.
    """
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    return tests[any(t.is_floating_point() and t.dtype.itemsize == 1 for t in tensors) :]


def _tensors(found: Any) -> tuple[torch.Tensor, ...]:
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


def _assert_close(found: Any, expected: Any, text: str) -> None:
    if isinstance(expected, (tuple, list)):
        for one, other in zip(found, expected, strict=True):
            _assert_close(one, other, text)
        return
    assert found.shape == expected.shape, f"{tuple(found.shape)} for {tuple(expected.shape)}: {text}"
    assert found.dtype == expected.dtype, f"{found.dtype} for {expected.dtype}: {text}"
    if not expected.is_floating_point():
        assert torch.equal(found, expected), f"integers differ: {text}"
        return
    norm = float(expected.double().norm())
    error = float((found.double() - expected.double()).norm())
    limit = TOLERANCE[expected.dtype] * norm
    assert error <= limit, f"off by {error:.3g}, {limit:.3g} allowed (NaN: not written): {text}"


def _strided(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), 7, device=value.device).to(value.dtype)
    wide[..., ::2] = value
    return wide[..., ::2]


def _text(args: tuple[Any, ...]) -> str:
    parts = [
        f"{str(arg.dtype).removeprefix('torch.')}{list(arg.shape)}"
        if isinstance(arg, torch.Tensor)
        else repr(arg)
        for arg in args
    ]
    return "arguments " + ", ".join(parts)


KERNEL_CHECKS: dict[str, Callable[[Op, Kernel, torch.device], None]] = {
    check.__name__: check
    for check in (
        check_equals_reference,
        check_inputs_unchanged,
        check_non_contiguous,
        check_opcheck,
        check_rejections,
    )
}
"""Every kernel check by name: functions of ``(op, kernel, device)`` that raise if it fails."""
