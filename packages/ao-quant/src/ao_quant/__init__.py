"""Quantization schemes for ao, found by name: ``ao_core.quantize_(model, "int8-dynamic")``."""

__version__ = "0.1.0"
