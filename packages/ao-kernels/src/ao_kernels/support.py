"""What the Triton kernels can take: devices, activations, groups."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable

import torch

from ao_core import Key, triton_support
from ao_core.triton_support import interpreting

logger = logging.getLogger(__name__)
HALVES = (torch.bfloat16, torch.float16)


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether the kernels in Gluon can run: compute capability 9.0, and a Triton that has it."""
    if device.type != "cuda" or interpreting() or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        importlib.import_module("ao_kernels.hopper_linear")
    except (ImportError, AttributeError) as error:
        logger.warning(
            "this triton lacks what the kernels from 5 rows on for Hopper need (%s): slower ones run. "
            "pip install -U triton, 3.6 or newer",
            error,
        )
        return False
    return True


def rejects(
    key: Key,
    provider: str,
    weights: Callable[[Key], str | None],
    dtypes: tuple[torch.dtype, ...] = HALVES,
) -> str | None:
    """Why the kernels can't run here, or None.

    Args:
        key: of the call.
        provider: one of :func:`ao_core.triton_support.providers`.
        weights: ``weights(key)`` is a reason why they can't read the weights, or None.
        dtypes: of the activations.
    """
    if reason := triton_support.rejects(key, provider):
        return reason
    if key.dtype not in dtypes:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it takes {names} activations, not {key.dtype}"
    return weights(key)


def group_misfit(group_size: int, scale: tuple[torch.Size, torch.dtype] | None, columns: int) -> str | None:
    """Why the groups of a weight can't be read, or None.

    Args:
        group_size: columns to a scale; -1 for all.
        scale: shape ``[N, G]`` and dtype of the scales.
        columns: a group must be a multiple of so many, unless there is one group.
    """
    if scale is not None and scale[0][-1] > 1 and group_size % columns:
        return f"it takes groups of a multiple of {columns} columns, not of {group_size}"
    return None


@functools.cache
def least_columns() -> int:
    """Of a product: Triton before 3.5 refuses fewer, later ones fill them up."""
    import triton

    return 16 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5) else 1


@functools.cache
def of_a_warp(warps: int, columns: int) -> bool:
    """Whether a product runs on a warp's matrix instructions on Hopper, not on those of four warps.

    Args:
        warps: of the program.
        columns: of the product.
    """
    import triton

    # Those of four warps take 16 columns and more in Triton 3.6, in later versions fewer too.
    return warps < 4 or (columns < 16 and triton.__version__.startswith("3.6."))
