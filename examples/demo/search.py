"""The demo's search: what to measure on, and the plan that comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from data import wiki_text

import ao_core as ao
from ao_autoquant import Exploration, autoquant, explore

SCHEMES = ("int8-weight-only", "int8-dynamic", "int4-weight-only:group_size=32", "nf4")
WINDOW, SEARCHED, HELD, DECODED = 512, 4, 8, 32


@dataclass
class Search:
    """What was measured on the model, and the plan that it was converted along."""

    found: Exploration
    plan: ao.Plan

    @property
    def chosen(self) -> dict[str, str]:
        """Layer → scheme, or ``"float"``."""
        return {name: self.plan.layers[name].scheme or "float" for name in self.found.options}


def search_(model: Any, tokenizer: Any, max_error: float) -> Search:
    """Find the smallest plan that costs ``max_error`` nats a token at most, and convert ``model`` along it.

    Errors are estimated on some windows of the calibration text, and the plan is checked on others; the
    evaluation text is not looked at.
    """
    text = wiki_text("calibration")[: (SEARCHED + HELD) * WINDOW * 8]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: (SEARCHED + HELD) * WINDOW])
    windows = list(ids.view(-1, 1, WINDOW))
    examples = [windows[0][:, :256], windows[0][:, :1]]  # a prompt, and a token after it
    options: dict[str, Any] = {
        "weights": [1, DECODED], "schemes": SCHEMES, "error": "loss", "calibration": windows[:SEARCHED],
    }  # fmt: skip
    found = explore(model, examples, **options, progress=True)
    plan = autoquant(
        model, examples, **options, known=found, objective="bytes", max_error=max_error, check=True,
        held=windows[SEARCHED:], apply=True,
    )  # fmt: skip
    return Search(found, plan)
