"""int8 and float8 matrix products, scaled or, of int8, exact in int32; and activations quantized for them."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ao_core.triton_support import interpreting
from ao_kernels import tiles
from ao_kernels.configs import Gemm, int8_config
from ao_kernels.device import activations
from ao_kernels.device.int8_gemm import int8_gemm, int8_gemm_copy_engine
from ao_kernels.weight_linear import check_columns, on_device

FLOAT8 = torch.float8_e4m3fn
_FORMS = {torch.int8: (127.0, 1e-5), FLOAT8: (448.0, 1e-12)}
"""The largest code, and the least absmax of a row of activations: a row of zeros becomes zeros."""


def quantize_rows(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and ``scale = max(absmax, least) / largest`` of each row of ``x`` ``[M, K]``.

    Args:
        x: float ``[M, K]``.
        dtype: int8, with the largest code 127 and the least absmax 1e-5; or float8_e4m3fn, 448 and 1e-12.

    Returns:
        ``[M, K]`` in ``dtype``, its rows a multiple of 16 bytes apart, and float32 ``[M]``. A row with
        infinity or NaN has that as its scale.
    """
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = x.new_empty(m, -(-k // 16) * 16, dtype=dtype)
    largest, least = _FORMS[dtype]
    scale = x.new_empty(m, dtype=torch.float32)
    if m:
        block = min(triton.next_power_of_2(k), 8192)
        with on_device(x.device):
            activations.quantize_rows[(m,)](
                x, codes, scale, k, x.stride(0), codes.stride(0), EPS=least, LARGEST=largest, BLOCK=block,
                ONCE=k <= block, INTERPRET=interpreting(), num_warps=max(min(block // 512, 16), 1),
                enable_fp_fusion=True,
            )  # fmt: skip
    return codes[:, :k], scale


def dynamic_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    config: Gemm | None = None,
) -> torch.Tensor:
    """``x`` ``[..., K]`` quantized row by row, times ``codes`` ``[N, K]``, scaled; in the dtype of ``x``.

    Activations become what the codes are, int8 or float8_e4m3fn.

    Raises:
        RuntimeError: the columns of ``x`` and the weight differ.
    """
    (n, k) = codes.shape
    check_columns(x, k)
    rows = x.reshape(-1, k)
    if config is None:
        kind = "float8-dynamic" if codes.dtype == FLOAT8 else "int8-dynamic"
        found = tiles.find(kind, rows.shape[0], n, k, x.dtype, x.device)
        config = found if isinstance(found, Gemm) else int8_config(rows.shape[0], n)
    x_codes, x_scale = quantize_rows(rows, codes.dtype)
    return scaled_mm(x_codes, codes, x_scale, scale, bias, x.dtype, config).view(*x.shape[:-1], n)


def scaled_mm(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    config: Gemm | None = None,
) -> torch.Tensor:
    """``(x @ w.T) * x_scale[:, None] * scale + bias`` in ``dtype``; without scales, the exact sums in int32.

    Args:
        x: int8 or float8_e4m3fn ``[M, K]``, rows in any distance.
        w: the same ``[N, K]``.
        x_scale: float ``[M]`` or None.
        scale: float, N numbers, or None; not without ``x_scale``.
        bias: float ``[N]`` or None; not without ``x_scale``.
        dtype: of the result.
        config: tiles; by default those of :func:`ao_kernels.configs.int8_config`.
    """
    (m, k), n = x.shape, w.shape[0]
    out = x.new_empty(m, n, dtype=dtype)
    if not out.numel():
        return out
    x, w = (each if each.stride(1) == 1 else each.contiguous() for each in (x, w))
    given = [out if each is None else each.contiguous() for each in (x_scale, scale, bias)]
    config = config or int8_config(m, n)
    scaled = (x_scale is not None) + (scale is not None)
    flags = {"FLOAT": x.dtype == FLOAT8, "SCALED": scaled, "BIAS": bias is not None}
    with on_device(x.device):
        _launch(x, w, out, given, (m, n, k), config, flags)
    return out


def _launch(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    given: list[torch.Tensor],
    sizes: tuple[int, int, int],
    config: Gemm,
    flags: dict[str, Any],
) -> None:
    m, n, k = sizes
    count = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    blocks = {
        **flags, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m, "STAGES": config.stages, "num_warps": config.warps,
        "enable_fp_fusion": True,
    }  # fmt: skip
    if config.loads == "copy engine" and _has_copy_engine(x.device) and all(map(_copyable, (x, w))):
        from triton.tools.tensor_descriptor import TensorDescriptor

        programs = count
        if config.programs_per_sm:
            units = torch.cuda.get_device_properties(x.device).multi_processor_count
            programs = min(count, units * config.programs_per_sm)
        descriptors = (
            TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
            TensorDescriptor.from_tensor(w, [config.block_n, config.block_k]),
        )
        int8_gemm_copy_engine[(programs,)](*descriptors, out, *given, m, n, k, programs, **blocks)
    else:
        int8_gemm[(count,)](
            x, w, out, *given, m, n, k, x.stride(0), w.stride(0), WHOLE=k % config.block_k == 0, **blocks
        )


def _has_copy_engine(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _copyable(matrix: torch.Tensor) -> bool:
    """The copy engine wants rows and the first byte at multiples of 16."""
    return matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0
