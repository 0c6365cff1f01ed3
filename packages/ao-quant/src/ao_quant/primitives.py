"""The quantization primitives of torchao (April 2024) under their names and argument order.

What differs, on purpose: arithmetic is float32 whatever the storage dtype, with one cast at the
end; integer products are exact on every device; bad arguments raise; nothing is registered in
torch's own operator namespaces. This module is their one public place.
"""

from __future__ import annotations

from ao_quant.primitives_affine import (
    dequantize_per_channel,
    dequantize_per_tensor,
    dynamically_quantize_per_channel,
    dynamically_quantize_per_tensor,
    per_token_dynamic_quant,
    quantize_activation_per_token_absmax,
)
from ao_quant.primitives_group_symmetric import (
    get_group_qparams_symmetric,
    group_quantize_tensor_symmetric,
    pack_int4_from_int8,
    unpack_int4_to_int8,
)
from ao_quant.primitives_groupwise import (
    get_groupwise_affine_qparams,
    groupwise_affine_dequantize_tensor,
    groupwise_affine_dequantize_tensor_from_qparams,
    groupwise_affine_quantize_tensor,
    groupwise_affine_quantize_tensor_from_qparams,
    pack_tinygemm_scales_and_zeros,
    unpack_tinygemm_scales_and_zeros,
)
from ao_quant.primitives_int8 import (
    quant_int8_dynamic_linear,
    quant_int8_dynamic_per_token_linear,
    quant_int8_matmul,
    quant_int8_per_token_matmul,
)

__all__ = [
    "dequantize_per_channel",
    "dequantize_per_tensor",
    "dynamically_quantize_per_channel",
    "dynamically_quantize_per_tensor",
    "get_group_qparams_symmetric",
    "get_groupwise_affine_qparams",
    "group_quantize_tensor_symmetric",
    "groupwise_affine_dequantize_tensor",
    "groupwise_affine_dequantize_tensor_from_qparams",
    "groupwise_affine_quantize_tensor",
    "groupwise_affine_quantize_tensor_from_qparams",
    "pack_int4_from_int8",
    "pack_tinygemm_scales_and_zeros",
    "per_token_dynamic_quant",
    "quant_int8_dynamic_linear",
    "quant_int8_dynamic_per_token_linear",
    "quant_int8_matmul",
    "quant_int8_per_token_matmul",
    "quantize_activation_per_token_absmax",
    "unpack_int4_to_int8",
    "unpack_tinygemm_scales_and_zeros",
]
