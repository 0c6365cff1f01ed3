"""GPTQ for ao, on any scheme: ``ao_core.compress_(model, "gptq:scheme=int4-weight-only", batches)``."""

__version__ = "0.1.0"
