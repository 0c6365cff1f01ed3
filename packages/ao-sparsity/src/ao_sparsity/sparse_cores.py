"""2:4 weights in the layouts of the sparse tensor cores, and the linear that runs on them.

Layouts, by name: ``cusparselt``, the library's own, one tensor of the values and then what it needs to find
them; ``cutlass``, values ``[N, K / 2]`` and 2-bit positions in CUTLASS's order, int16 ``[N, K / 16]`` or, for
int8, int32 ``[N, K / 32]``. Both are made and undone where the weight lies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ao_core import Kernel, Key, Op
from ao_core.numerics import affine
from ao_sparsity.linear import int8_codes, int8_product, pruned_gaussian

LAYOUTS = ("cusparselt", "cutlass")  # the better one first
# Rows and columns of a weight come in multiples of these (torch.sparse.semi_structured), rows of
# activations in the third.
_MULTIPLES = {
    ("cusparselt", torch.int8): (32, 32, 16),
    ("cusparselt", torch.bfloat16): (16, 16, 8),
    ("cusparselt", torch.float16): (16, 16, 8),
    ("cutlass", torch.int8): (16, 128, 16),
    ("cutlass", torch.bfloat16): (32, 64, 8),
    ("cutlass", torch.float16): (32, 64, 8),
}
_UNDONE_COLUMNS = 1024


def rejects_layout(
    layout: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a weight ``[N, K]`` can't be laid out for the sparse tensor cores of ``device``, or None.

    Names the first capability that is missing.
    """
    if device.type != "cuda":
        return f"sparse tensor cores need a CUDA device, and it lies on {device.type}"
    if (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"sparse tensor cores need compute capability 8.0, and {device} has {found[0]}.{found[1]}"
    if layout == "cusparselt" and not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} was built without cuSPARSELt"
    if (layout, dtype) not in _MULTIPLES:
        return f"{layout} has no 2:4 product for {dtype}; there is one for bfloat16, float16 and int8"
    rows, columns, _ = _MULTIPLES[layout, dtype]
    if len(shape) != 2 or shape[0] % rows or shape[1] % columns:
        return f"{layout} takes [N, K] in multiples of {rows} and {columns} for {dtype}, not {list(shape)}"
    return _fails(layout, dtype, device)


def lay_out(weight: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A 2:4 matrix ``[N, K]`` in ``layout``: ``packed``, and ``meta`` where positions lie apart."""
    if layout == "cusparselt":
        return torch._cslt_compress(weight.contiguous()), None
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    packed, meta = sparse_semi_structured_from_dense_cutlass(weight.contiguous())
    return packed, meta


def undo(
    packed: torch.Tensor, meta: torch.Tensor | None, shape: tuple[int, int], layout: str
) -> torch.Tensor:
    """The matrix ``[N, K]``; the inverse of :func:`lay_out`, exact.

    cuSPARSELt tells no one where it keeps what: the matrix is multiplied by the identity.
    """
    if layout == "cutlass":
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

        dense: torch.Tensor = sparse_semi_structured_to_dense_cutlass(packed, meta)
        return dense
    dtype = packed.dtype
    wide = torch.empty(shape, dtype=dtype, device=packed.device)
    out_dtype = torch.int32 if dtype == torch.int8 else None
    for start in range(0, shape[1], _UNDONE_COLUMNS):
        count = min(_UNDONE_COLUMNS, shape[1] - start)
        eye = torch.zeros(count, shape[1], dtype=dtype, device=packed.device)
        eye.diagonal(start).fill_(1)
        wide[:, start : start + count] = torch._cslt_sparse_mm(packed, eye.t(), out_dtype=out_dtype).to(dtype)
    return wide


def sparse_linear_reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    meta: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    layout: str,
) -> torch.Tensor:
    """``x @ weight.T + bias`` in float32, cast to the dtype of ``x`` once.

    Args:
        x: float ``[..., K]``; quantized to int8 token by token where there is a ``scale``.
        packed: float or int8, see :func:`lay_out`.
        meta: see :func:`lay_out`.
        scale: float32 ``[N, 1]`` of int8 weights, else None.
        bias: float ``[N]`` or None.
        rows: N.
        layout: of ``packed``.
    """
    weight = undo(packed, meta, (rows, x.shape[-1]), layout)
    if scale is not None:
        return int8_product(x, weight, scale, bias)
    found = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return _empty(x, packed, meta, scale, bias, rows, layout).copy_(found)


def sparse_linear_torch(
    x: torch.Tensor,
    packed: torch.Tensor,
    meta: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    layout: str,
) -> torch.Tensor:
    """Torch's 2:4 products; rows of ``x`` are filled up to a multiple of 8, or 16 for int8."""
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    count = flat.shape[0]
    if not count:
        return x.new_empty(*x.shape[:-1], rows)
    x_scale: torch.Tensor | None = None
    if scale is not None:
        flat, x_scale = affine.quantize_per_token(flat)
    if missing := -count % _MULTIPLES[layout, flat.dtype][2]:
        flat = F.pad(flat, (0, 0, 0, missing))
    flat = flat.contiguous()
    # Sums times the weight's scale alone could overflow in float16; bfloat16 reaches as far as float32.
    fused = scale is not None and layout == "cusparselt" and x.dtype == torch.bfloat16
    if scale is None:
        own = None if bias is None else bias.to(x.dtype)
        out = _product(flat, packed, meta, layout, bias=own, turned=True)
    elif fused:
        out = _product(flat, packed, meta, layout, alpha=scale.view(-1).float(), out_dtype=x.dtype)
    else:
        out = _product(flat, packed, meta, layout, out_dtype=torch.int32)
    out = out[:count]
    if scale is not None and x_scale is not None:
        wide = out.float() * x_scale
        if not fused:
            wide *= scale.view(-1)
        out = (wide if bias is None else wide + bias.float()).to(x.dtype)
    return out.reshape(*x.shape[:-1], rows)


def _product(
    flat: torch.Tensor,
    packed: torch.Tensor,
    meta: torch.Tensor | None,
    layout: str,
    *,
    bias: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    turned: bool = False,
) -> torch.Tensor:
    """``flat @ weight.T`` ``[M, N]``; M is a multiple that the layout takes.

    ``turned``: as cuSPARSELt computes it, ``[N, M]`` in memory. It takes half as long again to write rows.
    """
    if layout == "cusparselt":
        out = torch._cslt_sparse_mm(
            packed, flat.t(), bias=bias, alpha=alpha, out_dtype=out_dtype, transpose_result=not turned
        )
        return out.t() if turned else out
    assert meta is not None
    out = torch._sparse_semi_structured_mm(packed, meta, flat.t(), out_dtype=out_dtype).t().contiguous()
    return out if bias is None else out + bias


def _pruned(
    n: int, k: int, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.dtype]:
    """A 2:4 matrix ``[n, k]`` in ``dtype``, its scale where that is int8, the dtype of activations."""
    weight = pruned_gaussian(n, k, seed).to(device)
    if dtype == torch.int8:
        return *int8_codes(weight), torch.bfloat16
    return weight.to(dtype), None, dtype


@functools.cache
def _fails(layout: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``layout`` does not work on this device with this build of torch, tried on a small product."""
    values, scale, outer = _pruned(128, 256, 0, dtype, device)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(1)).to(device, outer)
    bias = torch.ones(128, device=device, dtype=outer)
    try:
        packed, meta = lay_out(values, layout)
        if not torch.equal(undo(packed, meta, (128, 256), layout), values):
            return f"{layout} does not give back a 2:4 matrix of {dtype} on {device}"
        found = sparse_linear_torch(x, packed, meta, scale, bias, 128, layout).float()
        expected = sparse_linear_reference(x.float(), packed, meta, scale, bias, 128, layout)
    except (RuntimeError, NotImplementedError) as error:
        return f"{layout} fails for {dtype} on {device}: {str(error).splitlines()[0]}"
    wrong = float((found - expected).norm() / expected.norm())
    return None if wrong < 0.01 else f"{layout} is off by {wrong:.2g} for {dtype} on {device}"


def _rejects(key: Key) -> str | None:
    *_, layout = key.options
    packed, _, scale, _ = key.weights
    assert packed is not None
    dtype = packed[1]
    if layout == "cusparselt" and not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} was built without cuSPARSELt"
    if key.device.type != "cuda":
        return f"sparse tensor cores need a CUDA device, not {key.device.type}"
    if scale is None and key.dtype != dtype:
        return f"activations in {key.dtype} and a weight in {dtype}: torch's 2:4 product takes one dtype"
    return None


def _empty(
    x: torch.Tensor,
    packed: torch.Tensor,
    meta: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    layout: str,
) -> torch.Tensor:
    """Room for the output ``[..., N]``, in the order in which the product writes it."""
    lead = x.shape[:-1]
    if layout != "cusparselt" or scale is not None or not math.prod(lead):
        return x.new_empty((*lead, rows))
    count, multiple = math.prod(lead), _MULTIPLES[layout, packed.dtype][2]
    room = x.new_empty(rows, (count + multiple - 1) // multiple * multiple)
    return room.t()[:count].view(*lead, rows)


def sparse_linear_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of ``semi_sparse_packed_linear``: every layout that can be made on ``device``."""
    for layout in LAYOUTS:
        for dtype in (torch.bfloat16, torch.float16, torch.int8):
            for m, k, n in ((1, 256, 64), (17, 576, 192), (40, 128, 32), (0, 128, 64)):
                made = rejects_layout(layout, (n, k), dtype, device) is None
                if not (made or (layout == "cutlass" and device.type == "cpu" and k % 128 == 0)):
                    continue
                values, scale, outer = _pruned(n, k, k, dtype, device)
                x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(device, outer)
                bias = torch.ones(n, device=device, dtype=outer) if m % 2 else None
                yield (x, *lay_out(values, layout), scale, bias, n, layout)


SEMI_SPARSE_PACKED_LINEAR = Op(
    "semi_sparse_packed_linear",
    "(Tensor x, Tensor packed, Tensor? meta, Tensor? scale, Tensor? bias, int rows, str layout) -> Tensor",
    reference=sparse_linear_reference,
    fake=_empty,
    samples=sparse_linear_samples,
)
KERNELS = [Kernel("semi_sparse_packed_linear", "torch", sparse_linear_torch, rejects=_rejects)]
