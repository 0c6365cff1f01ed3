"""Triton kernels for the linears of quantized weights, as an ao plugin."""

__version__ = "0.1.0"
