"""Ops: what a kernel must compute, with a readable reference that always runs.

An op is registered with ``torch.library`` under ``ao::<name>`` as soon as it is made, so that one call
is one node for ``torch.compile``, ``torch.export`` and CUDA graphs. Which kernel runs is decided inside
the op, by :mod:`ao_core.kernels`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ao_core.errors import PluginError
from ao_core.registry import Registry

Dispatch = Callable[["Op", tuple[Any, ...], "str | None"], Any]

_library = torch.library.Library("ao", "DEF")
_defined: dict[str, Op] = {}
_dispatch: Dispatch | None = None


def set_dispatch(dispatch: Dispatch) -> None:
    """Install the function that picks and runs a kernel; without one, every op runs its reference."""
    global _dispatch
    _dispatch = dispatch


class Op:
    """A named operation.

    Args:
        name: lower case, digits and underscores; the torch op is ``ao::<name>``.
        schema: torch.library schema without the name, such as
            ``"(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor"``. A keyword-only
            ``str? provider=None`` is appended: the provider that a plan pinned.
        reference: plain torch, any device; defines what is right.
        fake: shapes and dtypes only, for tracing.
        samples: ``samples(device)`` yields argument tuples with awkward sizes.
        activations: how many leading arguments are activations. Their shapes are not part of the
            key by which a kernel is chosen, so a dynamic row count never re-chooses.
        problem: ``problem(x, n, seed)`` makes arguments of a wanted size, for benchmarks and tuning: float
            activations ``[M, K]``, and random weights with ``n`` outputs. None: the op is not measured.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        samples: Callable[[torch.device], Iterable[tuple[Any, ...]]],
        activations: int = 1,
        problem: Callable[[torch.Tensor, int, int], tuple[Any, ...]] | None = None,
    ) -> None:
        self.name, self.schema = name, schema
        self.reference, self.fake, self.samples = reference, fake, samples
        self.activations, self.problem = activations, problem
        self.fault = _schema_problem(name, schema)
        if self.fault is None:
            _define(self)
            self.overload = getattr(torch.ops.ao, name).default

    def __call__(self, *args: Any, provider: str | None = None) -> Any:
        """Run the op: one node in a graph. ``provider`` is the one that a plan pinned."""
        if self.fault is not None:
            raise PluginError(f"op {self.name!r} can't run: {self.fault}")
        return self.overload(*args, provider=provider)

    def __repr__(self) -> str:
        return f"Op({self.name!r})"

    def invalid(self) -> str | None:
        """Why the op can't be registered, or None. A name that is taken is for the loader to judge."""
        return _schema_problem(self.name, self.schema)


def _schema_problem(name: str, schema: str) -> str | None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        return f"op name {name!r} must be lower case letters, digits and underscores"
    if not re.fullmatch(r"\(.+\)\s*->\s*.+", schema) or "*" in schema:
        return f"schema {schema!r} must look like '(Tensor x, Tensor? bias) -> Tensor', without '*'"
    try:
        torch._C.parse_schema(f"ao::{name}{schema}")
    except RuntimeError as error:
        return f"schema {schema!r} does not parse: {str(error).splitlines()[0]}"
    return None


def _define(op: Op) -> None:
    held = _defined.get(op.name)
    if held is not None:
        if held.reference.__module__ == op.reference.__module__ and held.schema == op.schema:
            _defined[op.name] = op  # the module was reloaded
        else:
            op.fault = f"{held.reference.__module__} has defined an op of that name already"
        return
    _defined[op.name] = op
    arguments, returns = op.schema.rsplit("->", 1)
    full = f"{arguments.rstrip()[:-1]}, *, str? provider=None) -> {returns.strip()}"
    _library.define(op.name + full)
    _library.impl(op.name, _runner(op.name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ao::{op.name}", _faker(op.name), lib=_library)


def _runner(name: str) -> Callable[..., Any]:
    def run(*args: Any, provider: str | None = None) -> Any:
        op = _defined[name]
        if _dispatch is None:
            return op.reference(*args)
        return _dispatch(op, args, provider)

    return run


def _faker(name: str) -> Callable[..., Any]:
    def fake(*args: Any, provider: str | None = None) -> Any:
        return _defined[name].fake(*args)

    return fake


OPS: Registry[Op] = Registry("op")
