"""Quantization arithmetic as free functions on plain tensors.

``affine``: scales, zero points, integer codes. ``codebook``: nearest entry of a small table.
``hessian``: factors and errors of a layer's Hessian. ``pack``: sub-byte codes in bytes.
Each name lives in its module: ``from ao_core.numerics import affine``, then ``affine.quantize``.
"""

from __future__ import annotations

from ao_core.numerics import affine, codebook, hessian, pack

__all__ = ["affine", "codebook", "hessian", "pack"]
