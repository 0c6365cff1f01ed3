"""Hopper's copy engine and views of shared memory in Gluon, by whichever names Triton has for them."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Each by its name in the latest Triton, or that of 3.6.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
wait_for_all = getattr(gl, "barrier", None) or gl.thread_barrier
"""Until all threads of the program, or of its task, are here."""

_PUBLIC = tl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reshaped(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same shared memory as tiles ``SHAPE[1:]`` in ``LAYOUT``, one after the other."""
    if _PUBLIC:
        view = memory.reinterpret(DTYPE, SHAPE, LAYOUT)
    else:
        view = memory._reinterpret(DTYPE, SHAPE, LAYOUT)
    return view
