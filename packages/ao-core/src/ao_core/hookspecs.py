"""Every extension point of ao. A plugin implements any of these with ``@ao_core.hookimpl``.

A distribution names its plugin module under the entry-point group ``ao``::

    [project.entry-points.ao]
    mine = "my_package.plugin"

This module imports no torch: the command line reads it before anything heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import torch

    from ao_core.algorithm import Algorithm
    from ao_core.command import Command
    from ao_core.kernels import Kernel, Key
    from ao_core.ops import Op
    from ao_core.scheme import Scheme

GROUP = "ao"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def ao_register_schemes() -> Sequence[type[Scheme]]:
    """Scheme classes that this plugin provides.

    Returns:
        Frozen dataclasses derived from :class:`ao_core.Scheme`, each with a name of its own.
    """
    raise NotImplementedError("a hookspec has no body")


@hookspec
def ao_register_ops() -> Sequence[Op]:
    """Ops that this plugin defines; registered before any kernel.

    Returns:
        :class:`ao_core.Op` instances: a schema with a reference, a fake and samples.
    """
    raise NotImplementedError("a hookspec has no body")


@hookspec
def ao_register_kernels() -> Sequence[Kernel]:
    """Kernels: implementations of ops, this plugin's own or another's.

    Returns:
        :class:`ao_core.Kernel` instances, one a provider and op. A kernel of an op that is not
        installed is left out and listed by ``ao plugins``.
    """
    raise NotImplementedError("a hookspec has no body")


@hookspec
def ao_register_algorithms() -> Sequence[type[Algorithm]]:
    """Algorithms: what needs calibration data.

    Returns:
        Classes with a ``name`` and ``run(model, plan, batches) -> Report``, such as subclasses of
        :class:`ao_core.BlockAlgorithm`.
    """
    raise NotImplementedError("a hookspec has no body")


@hookspec
def ao_register_commands() -> Sequence[Command]:
    """Subcommands of ``ao``. Called for ``ao --help``: import torch inside the command, not above it.

    Returns:
        :class:`ao_core.Command` instances: a name and a typer function or app.
    """
    raise NotImplementedError("a hookspec has no body")


@hookspec
def ao_propose_schemes(fqn: str, weight: torch.Tensor, sample: torch.Tensor | None) -> Sequence[Scheme]:
    """Candidates that a search should measure on one layer.

    Args:
        fqn: the layer's qualified name.
        weight: its float weight ``[..., N, K]``.
        sample: some of the activations that it sees ``[rows, K]``, or None if unknown.

    Returns:
        Schemes with their options; a scheme that rejects the weight may be among them.
    """
    raise NotImplementedError("a hookspec has no body")


@hookspec(firstresult=True)
def ao_choose_kernel(op: Op, key: Key, usable: Sequence[Kernel]) -> Kernel | None:
    """Prefer a kernel, by measurement for instance. Asked once a key; the first answer counts.

    Args:
        op: the op to run.
        key: weight, device and activation dtype, never the activation's shape.
        usable: the kernels that do not reject the key, highest priority first.

    Returns:
        One of ``usable``, or None to leave the choice to priority.
    """
    raise NotImplementedError("a hookspec has no body")
