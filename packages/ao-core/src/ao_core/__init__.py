"""Quantization and sparsity for PyTorch, extended by ``pip install``.

``import ao_core as ao`` gives the public names below; each is imported when first used, so that this
import is quick and ``ao --help`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ao_core import registry as _registry
from ao_core.hookspecs import hookimpl, hookspec

if TYPE_CHECKING:
    from ao_core import calibrate, numerics, testing
    from ao_core.algorithm import Algorithm, algorithms, parse_algorithm
    from ao_core.checkpoint import load, save
    from ao_core.command import Command
    from ao_core.compress import BlockAlgorithm, CompressReport, compress_
    from ao_core.convert import Report, apply_, quantize_
    from ao_core.errors import (
        AoError,
        CheckpointError,
        ModelError,
        OptionError,
        PlanError,
        PlanWarning,
        PluginError,
        RejectedError,
        UnknownNameError,
    )
    from ao_core.kernels import KERNELS, Kernel, Key, explain, kernel_for, use_provider
    from ao_core.layers import Layer, Layers, find_layers
    from ao_core.metrics import model_bytes, perplexity, sqnr, stored_bytes
    from ao_core.models import load_model
    from ao_core.ops import OPS, Op
    from ao_core.plan import Choice, Plan, Rule, fingerprint, resolve
    from ao_core.progress import reporting
    from ao_core.proposals import Proposals, propose, scheme_source
    from ao_core.registry import Fault
    from ao_core.scheme import QParams, Scheme, parse_scheme, schemes
    from ao_core.shards import check_target
    from ao_core.tensor import InputScaledTensor, QuantizedTensor
    from ao_core.timing import Rounds, microseconds

__version__ = "0.1.0"

_HOME = {
    "algorithm": ["Algorithm", "algorithms", "parse_algorithm"],
    "checkpoint": ["load", "save"],
    "command": ["Command"],
    "compress": ["BlockAlgorithm", "CompressReport", "compress_"],
    "convert": ["Report", "apply_", "quantize_"],
    "errors": [
        "AoError", "CheckpointError", "ModelError", "OptionError", "PlanError", "PlanWarning",
        "PluginError", "RejectedError", "UnknownNameError",
    ],
    "kernels": ["KERNELS", "Kernel", "Key", "explain", "kernel_for", "use_provider"],
    "layers": ["Layer", "Layers", "find_layers"],
    "metrics": ["model_bytes", "perplexity", "sqnr", "stored_bytes"],
    "models": ["load_model"],
    "ops": ["OPS", "Op"],
    "plan": ["Choice", "Plan", "Rule", "fingerprint", "resolve"],
    "progress": ["reporting"],
    "proposals": ["Proposals", "propose", "scheme_source"],
    "registry": ["Fault"],
    "scheme": ["QParams", "Scheme", "parse_scheme", "schemes"],
    "shards": ["check_target"],
    "tensor": ["InputScaledTensor", "QuantizedTensor"],
    "timing": ["Rounds", "microseconds"],
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "KERNELS",
    "OPS",
    "Algorithm",
    "AoError",
    "BlockAlgorithm",
    "CheckpointError",
    "Choice",
    "Command",
    "CompressReport",
    "Fault",
    "InputScaledTensor",
    "Kernel",
    "Key",
    "Layer",
    "Layers",
    "ModelError",
    "Op",
    "OptionError",
    "Plan",
    "PlanError",
    "PlanWarning",
    "PluginError",
    "Proposals",
    "QParams",
    "QuantizedTensor",
    "RejectedError",
    "Report",
    "Rounds",
    "Rule",
    "Scheme",
    "UnknownNameError",
    "__version__",
    "algorithms",
    "apply_",
    "calibrate",
    "check_target",
    "compress_",
    "explain",
    "find_layers",
    "fingerprint",
    "hookimpl",
    "hookspec",
    "kernel_for",
    "load",
    "load_model",
    "microseconds",
    "model_bytes",
    "numerics",
    "parse_algorithm",
    "parse_scheme",
    "perplexity",
    "propose",
    "quantize_",
    "reporting",
    "resolve",
    "save",
    "scheme_source",
    "schemes",
    "sqnr",
    "stored_bytes",
    "testing",
    "use_provider",
]  # fmt: skip


def _load_plugins() -> None:
    from ao_core.plugins import load

    load()


_registry.set_loader(_load_plugins)


def __getattr__(name: str) -> Any:
    if name in ("calibrate", "numerics", "testing"):
        return importlib.import_module(f"ao_core.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'ao_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ao_core.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
