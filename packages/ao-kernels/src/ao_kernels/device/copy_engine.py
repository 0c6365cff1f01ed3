"""Hopper's copy engine in Gluon, by whichever name Triton has for it."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # until Triton 3.6
