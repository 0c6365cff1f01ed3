"""Quantization schemes for ao. They are found by their names: ``ao_core.quantize_(model, "int8-dynamic")``."""

__version__ = "0.1.0"
