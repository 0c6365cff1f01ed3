"""Kernels: implementations of ops, and how one is chosen.

Order of choice: forced (``AO_KERNELS``, :func:`use_provider`), pinned by the plan, measured (the
``ao_choose_kernel`` hook), priority, reference. A forced or pinned kernel that rejects is an error; an
automatic choice logs what it passed over, once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ao_core.errors import OptionError, RejectedError, UnknownNameError
from ao_core.ops import OPS, Op, set_dispatch
from ao_core.registry import Registry

logger = logging.getLogger(__name__)

Chooser = Callable[["Op", "Key", "Sequence[Kernel]"], "Kernel | None"]


def _never(key: Key) -> str | None:
    return None


@dataclass(frozen=True)
class Key:
    """What a kernel may be chosen by: never the activation's shape.

    Attributes:
        device: where all tensors lie.
        dtype: the activation's dtype.
        weights: shape and dtype of each tensor after the activations; None for one not given.
        options: the op's other arguments.
    """

    device: torch.device
    dtype: torch.dtype
    weights: tuple[tuple[torch.Size, torch.dtype] | None, ...]
    options: tuple[Any, ...]

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA compute capability, (0, 0) on other devices."""
        if self.device.type != "cuda":
            return (0, 0)
        return torch.cuda.get_device_capability(self.device)

    def __str__(self) -> str:
        shapes = ", ".join(_shape_text(weight) for weight in self.weights if weight)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device}, {dtype} activations, {shapes}"


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Attributes:
        op: the op's name.
        provider: who computes: ``"torch"``, ``"triton"``, any word but ``"reference"``.
        fn: takes the op's arguments. It decides by row count inside.
        priority: the highest that does not reject wins; the reference counts as minus infinity.
        rejects: ``rejects(key)`` is a reason, or None.
    """

    op: str
    provider: str
    fn: Callable[..., Any]
    priority: float = 0.0
    rejects: Callable[[Key], str | None] = _never

    def invalid(self) -> str | None:
        """Why the kernel can't be registered, or None."""
        if not isinstance(self.op, str):
            return f"op must be the op's name, and is {self.op!r}"
        word = isinstance(self.provider, str) and self.provider.isidentifier()
        if not word or self.provider == "reference":
            return f"provider {self.provider!r} must be a word other than 'reference'"
        if not isinstance(self.priority, (int, float)):
            return f"priority must be a number, and is {self.priority!r}"
        return None if callable(self.fn) and callable(self.rejects) else "fn and rejects must be callable"


@dataclass(frozen=True)
class Row:
    """A line of ``ao kernels --explain``: one kernel for one key."""

    key: str
    provider: str
    priority: float
    reason: str | None
    chosen: bool


KERNELS: Registry[Kernel] = Registry("kernel")
_chooser: Chooser | None = None
_forced: ContextVar[str] = ContextVar("ao_provider", default="")
_table: dict[tuple[Any, ...], Callable[..., Any]] = {}
_logged: set[tuple[str, str, str]] = set()


def set_chooser(chooser: Chooser) -> None:
    """Install the measured choice; called by the plugin loader."""
    global _chooser
    _chooser = chooser
    clear_choices()


def clear_choices() -> None:
    """Forget which kernel runs for which key; each is asked for again."""
    _table.clear()


@contextmanager
def use_provider(provider: str, *, op: str | None = None) -> Iterator[None]:
    """Force a provider inside the block, for every op or for one; an inner block wins.

    Raises (when an op runs):
        RejectedError: the provider's kernel rejects, with its reason.
        UnknownNameError: the op has no kernel of that provider, or there is no op called ``op``.
    """
    mine = f"{op}={provider}" if op else provider
    token = _forced.set(f"{mine},{_forced.get()}")
    try:
        yield
    finally:
        _forced.reset(token)


def dispatch(op: Op, args: tuple[Any, ...], pinned: str | None) -> Any:
    """Run ``op`` with the kernel that the choice order names."""
    activations = op.activations
    signature = (
        op.name,
        pinned,
        _forced.get(),
        *[(a.dtype, a.device) if isinstance(a, torch.Tensor) else _hashable(a) for a in args[:activations]],
        *[_outline(a) if isinstance(a, torch.Tensor) else _hashable(a) for a in args[activations:]],
    )
    fn = _table.get(signature)
    if fn is None:
        fn = choose(op, key_of(op, args), pinned).fn
        _table[signature] = fn
    return fn(*args)


set_dispatch(dispatch)


def key_of(op: Op, args: Sequence[Any]) -> Key:
    """The key of a call.

    Raises:
        RejectedError: the tensors lie on different devices.
    """
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise RejectedError(
            f"{op.name} needs all tensors on one device, and found "
            f"{' and '.join(sorted(map(str, devices)))}. Move the model or the input with .to(device)."
        )
    weights = tuple(
        (arg.shape, arg.dtype) if isinstance(arg, torch.Tensor) else None
        for arg in args[op.activations :]
        if arg is None or isinstance(arg, torch.Tensor)
    )
    options = tuple(_hashable(a) for a in args if a is not None and not isinstance(a, torch.Tensor))
    return Key(tensors[0].device, tensors[0].dtype, weights, options)


def choose(op: Op, key: Key, pinned: str | None = None) -> Kernel:
    """The kernel that runs for ``key``.

    Raises:
        RejectedError: the forced or pinned kernel rejects the key.
        UnknownNameError: there is no kernel of the forced or pinned provider.
    """
    kernels = _kernels_of(op)
    explicit = _forced_for(op.name) or pinned
    if explicit is not None:
        return _explicit(op, key, explicit, kernels)
    usable = []
    for kernel in kernels:
        reason = kernel.rejects(key)
        if reason is None:
            usable.append(kernel)
        else:
            _log_once(kernel, reason)
    preferred = _chooser(op, key, usable) if _chooser is not None else None
    if preferred is not None and preferred not in usable:
        named = repr(preferred.provider if isinstance(preferred, Kernel) else preferred)
        raise RejectedError(
            f"ao_choose_kernel preferred {named} for {op.name} on {key}, which is not one of the usable "
            f"kernels {[kernel.provider for kernel in usable]}. Mend that plugin, or disable it."
        )
    return preferred or usable[0]


def kernel_for(op: Op, *args: Any, provider: str | None = None) -> Kernel:
    """The kernel that would run for a call of ``op``; raises as :func:`choose` does."""
    return choose(op, key_of(op, args), provider)


def explain(op: Op, device: torch.device | str = "cpu") -> list[Row]:
    """Every kernel of ``op`` for each key among its samples: its priority, its reason, the choice."""
    rows: list[Row] = []
    seen: set[Key] = set()
    for args in op.samples(torch.device(device)):
        key = key_of(op, args)
        if key in seen:
            continue
        seen.add(key)
        chosen = choose(op, key)
        rows += [
            Row(str(key), kernel.provider, kernel.priority, kernel.rejects(key), kernel == chosen)
            for kernel in _kernels_of(op)
        ]
    return rows


def check_provider(provider: str) -> None:
    """Raise unless some op has a kernel of ``provider``, or it is the reference.

    Raises:
        UnknownNameError: none has.
    """
    known = sorted({entry.item.provider for entry in KERNELS.entries().values()} | {"reference"})
    if provider not in known:
        raise UnknownNameError(
            f"no installed plugin has kernels of provider {provider!r}; there are {', '.join(known)}. "
            "Install its package, or leave the provider out of the rule or the plan."
        )


def _kernels_of(op: Op) -> list[Kernel]:
    entries = KERNELS.entries().values()
    own = [entry.item for entry in entries if entry.item.op == op.name]
    own.sort(key=lambda kernel: -kernel.priority)
    return [*own, Kernel(op.name, "reference", op.reference, float("-inf"))]


def _explicit(op: Op, key: Key, provider: str, kernels: list[Kernel]) -> Kernel:
    for kernel in kernels:
        if kernel.provider != provider:
            continue
        if reason := kernel.rejects(key):
            raise RejectedError(
                f"kernel {provider!r} was asked for explicitly for {op.name} on {key}, and rejects it: "
                f"{reason}. Ask for another (there are {', '.join(k.provider for k in kernels)}), or none."
            )
        return kernel
    raise UnknownNameError(
        f"{op.name} has no kernel of provider {provider!r}; it has "
        f"{', '.join(kernel.provider for kernel in kernels)}. Check AO_KERNELS, use_provider and the plan."
    )


def _forced_for(op_name: str) -> str | None:
    for text in (_forced.get(), os.environ.get("AO_KERNELS", "")):
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, _, provider = part.rpartition("=")
            if not provider:
                raise OptionError(f"AO_KERNELS takes PROVIDER or OP=PROVIDER, and holds {part!r}.")
            if name in ("", op_name):
                return provider
            OPS.get(name)  # a misspelt op would force nothing, in silence
    return None


def _log_once(kernel: Kernel, reason: str) -> None:
    mark = (kernel.op, kernel.provider, reason)
    if mark not in _logged:
        _logged.add(mark)
        logger.info("%s: kernel %s passed over: %s", kernel.op, kernel.provider, reason)


def _outline(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape


def _hashable(option: Any) -> Any:
    return tuple(option) if isinstance(option, list) else option


def _shape_text(weight: tuple[torch.Size, torch.dtype]) -> str:
    shape, dtype = weight
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


__all__ = [
    "KERNELS",
    "OPS",
    "Kernel",
    "Key",
    "Row",
    "choose",
    "clear_choices",
    "dispatch",
    "explain",
    "kernel_for",
    "key_of",
    "set_chooser",
    "use_provider",
]
