"""Calibration: walking a model block by block, and showing algorithms what its layers see."""

from __future__ import annotations

from ao_core.calibrate import processes
from ao_core.calibrate.batches import as_batches, check_tokens, tensors
from ao_core.calibrate.blocks import Blocks, NoBlocks, find_blocks
from ao_core.calibrate.collectors import Absmax, Collector, Hessian, PairedHessian, Sample, SquaredNorm
from ao_core.calibrate.stage import Stage, matrices
from ao_core.calibrate.text import SentencePiece, read_texts, tokenized
from ao_core.calibrate.trace import Call, Trace, place
from ao_core.calibrate.walker import Walk, Walker

__all__ = [
    "Absmax",
    "Blocks",
    "Call",
    "Collector",
    "Hessian",
    "NoBlocks",
    "PairedHessian",
    "Sample",
    "SentencePiece",
    "SquaredNorm",
    "Stage",
    "Trace",
    "Walk",
    "Walker",
    "as_batches",
    "check_tokens",
    "find_blocks",
    "matrices",
    "place",
    "processes",
    "read_texts",
    "tensors",
    "tokenized",
]
