"""Autoquant on a ViT-B/16-shaped model with random weights: what its plans gain for one image and for 32.

    python tests/benchmarks/autoquant_vit.py docs/results/h200-autoquant-vit.json [--batches 1 32]

For each batch: a search from an empty cache, then the whole model in float, with int8-dynamic on every
linear, and along the plan. On a GPU the model is captured as a CUDA graph and replayed. Small, on a CPU:

    python tests/benchmarks/autoquant_vit.py FILE --layers 1 --hidden 64 --image 32 --batches 1 2
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from autoquant_llama import ROUNDS, Run, in_turns, searched
from torch import nn

import ao_core as ao
from ao_core.plan import fingerprint

PATCH, CLASSES = 16, 1000
UNIFORM = "int8-dynamic"


class Block(nn.Module):
    """Attention and an MLP, norms first: ``x`` ``[B, T, H]``."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden, eps=1e-6), nn.LayerNorm(hidden, eps=1e-6)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, T, H]
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Images ``[B, 3, S, S]`` to logits ``[B, classes]`` (Dosovitskiy et al., arXiv 2010.11929, table 1)."""

    def __init__(self, layers: int, hidden: int, heads: int, image: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, hidden, PATCH, PATCH)
        self.first = nn.Parameter(torch.zeros(1, 1, hidden))
        self.places = nn.Parameter(torch.zeros(1, (image // PATCH) ** 2 + 1, hidden))
        self.blocks = nn.Sequential(*(Block(hidden, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(hidden, eps=1e-6), nn.Linear(hidden, CLASSES)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)  # [B, T - 1, H]
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


def random_vit(device: str, *, layers: int, hidden: int, heads: int, image: int) -> VisionTransformer:
    """In bfloat16; the same values at each call."""
    torch.manual_seed(0)
    model = VisionTransformer(layers, hidden, heads, image).eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
        if parameter.dim() > 2:
            parameter.normal_(std=0.02)
    return model.to(device, torch.bfloat16)


def measured(model: nn.Module, images: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Of one batch: the search, and milliseconds of a run in float, with the uniform scheme, and the plan."""
    found, plan, facts = searched(model, [(images,)], [1.0], options)
    used = Counter(choice.scheme or "float" for name, choice in plan.layers.items() if name in found.options)
    variants: dict[str, Any] = {"bfloat16": None, UNIFORM: UNIFORM, "plan": plan}
    rows, runs = {}, {}
    for name, what in variants.items():
        changed = copy.deepcopy(model)
        if isinstance(what, str):
            ao.quantize_(changed, what)
        elif what is not None and any(choice.scheme for choice in what.layers.values()):
            ao.apply_(changed, what)
        rows[name] = {"stored_bytes": sum(ao.stored_bytes(each) for each in changed.parameters())}
        runs[name] = Run(changed, (images,))
    for name, took in in_turns(runs, ROUNDS).items():
        rows[name]["ms"] = round(1e3 * took, 4)
    return {
        "search": facts,
        "chosen": dict(used),
        "reasons": {name: choice.reason for name, choice in plan.layers.items() if choice.reason},
        "predicted_us": {
            "bfloat16": round(found.totals(dict.fromkeys(found.options, "float")).us, 1),
            **(
                {UNIFORM: round(found.totals(found.uniform()[UNIFORM]).us, 1)}
                if UNIFORM in found.uniform()
                else {}
            ),
            "plan": round(found.totals(found.choose()).us, 1),
        },
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--image", type=int, default=224, help=f"pixels of a side, a multiple of {PATCH}")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--schemes", nargs="*", help="candidates; by default all that are installed")
    options = parser.parse_args()
    if options.hidden % 64 or options.image % PATCH:
        parser.error(
            f"--hidden must be a multiple of 64 and --image of {PATCH}: {options.hidden} and {options.image} "
            "were given"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {
        "layers": options.layers, "hidden": options.hidden, "heads": options.hidden // 64,
        "image": options.image,
    }  # fmt: skip
    data: dict[str, Any] = {
        "command": "python tests/benchmarks/autoquant_vit.py FILE",
        "fingerprint": fingerprint(device),
        **sizes,
        "batches": {},
    }
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        os.environ["AO_AUTOQUANT_CACHE"] = str(Path(folder) / "cache.sqlite")
        model = random_vit(device, **sizes)
        for batch in options.batches:
            images = torch.randn(batch, 3, options.image, options.image, device=device, dtype=torch.bfloat16)
            data["batches"][str(batch)] = measured(model, images, options)
            print(batch, json.dumps(data["batches"][str(batch)]["rows"]), flush=True)
    temporary = options.file.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.file)


if __name__ == "__main__":
    sys.exit(main())
