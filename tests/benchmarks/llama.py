"""A Llama-3-8B-shaped model with random weights and a static cache, for benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, HEADS, KV_HEADS, MIDDLE, LAYERS, VOCABULARY = 4096, 32, 8, 14336, 32, 128256
CONTEXT = 512


class Block(nn.Module):
    """Attention over a cache of keys and values, and a gated MLP: ``x`` ``[1, T, H]`` at positions ``at``."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, middle: int, context: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, hidden // heads
        wide = kv_heads * self.size
        for name, n, k in (
            ("q", hidden, hidden), ("k", wide, hidden), ("v", wide, hidden), ("o", hidden, hidden),
            ("gate", middle, hidden), ("up", middle, hidden), ("down", hidden, middle),
        ):  # fmt: skip
            setattr(self, name, nn.Linear(k, n, bias=False))
        self.norms = nn.ParameterList([torch.ones(hidden), torch.ones(hidden)])
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, kv_heads, context, self.size))

    def forward(self, x, at, cosine, sine, mask):
        y = F.rms_norm(x, x.shape[-1:], self.norms[0], 1e-5)
        q, k, v = (
            layer(y).view(1, len(at), -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        q, k = rotated(q, cosine, sine), rotated(k, cosine, sine)
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(1, len(at), -1))
        y = F.rms_norm(x, x.shape[-1:], self.norms[1], 1e-5)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotated(x, cosine, sine):
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


class Llama(nn.Module):
    """Tokens ``[T]`` at positions ``at`` ``[T]`` to the logits of the one after them ``[1, V]``."""

    def __init__(self, layers=LAYERS, hidden=HIDDEN, heads=HEADS, kv_heads=KV_HEADS, middle=MIDDLE, context=CONTEXT, vocabulary=VOCABULARY):  # fmt: skip  # noqa: E501
        super().__init__()
        self.context, self.size = context, hidden // heads
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, kv_heads, middle, context) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(hidden))
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, token, at):
        x = self.embedding(token)[None]
        half = torch.arange(0, self.size, 2, device=at.device) / self.size
        angle = (at[:, None] * 500000.0**-half).repeat(1, 2)
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        mask = (torch.arange(self.context, device=at.device) <= at[:, None])[None, None]
        for block in self.blocks:
            x = block(x, at, cosine, sine, mask)
        return self.head(F.rms_norm(x[:, -1:], x.shape[-1:], self.norm, 1e-5))[0]


def random_model(device: str, **sizes: int) -> Llama:
    """Weights in bfloat16, drawn on the device."""
    with torch.device("meta"):
        model = Llama(**sizes).bfloat16()
    model = model.to_empty(device=device).eval()
    torch.manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 2:
            tensor.data.normal_(std=tensor.shape[1] ** -0.5 if "embedding" not in name else 1.0)
        else:
            tensor.data.fill_(1.0 if "norm" in name else 0.0)
    return model
