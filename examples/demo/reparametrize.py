"""The same function with other weights, so that 4-bit schemes are judged honestly.

The demo's model was stored in 4-bit blocks of 32 neighbouring columns. A scheme whose groups meet
these blocks finds them again and looks lossless. Here every column gets new neighbours: residual
channels and the hidden channels of each MLP are permuted, and the values of each attention head are
rotated, which leaves what the model computes as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def reparametrize_(model: nn.Module, *, seed: int = 0) -> None:
    """Permute and rotate the weights of a Llama-architecture Hugging Face model in place.

    Logits stay the same up to rounding. Weights keep their dtype and parameters their identity, so
    that a tied embedding stays tied; the arithmetic is float64.

    Args:
        model: a ``LlamaForCausalLM`` with plain float weights.
        seed: decides the permutations and the rotations.

    Raises:
        ValueError: the model is of another architecture.
    """
    llama: Any = model
    kind = getattr(getattr(llama, "config", None), "model_type", None)
    if kind != "llama":
        raise ValueError(f"reparametrize_ knows the Llama architecture, found {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    _permute_residual(llama, generator)
    for layer in llama.model.layers:
        _permute_hidden(layer.mlp, generator)
        _rotate_values(layer.self_attn, llama.config, generator)


def _permute_residual(llama: Any, generator: torch.Generator) -> None:
    """One order of the channels that all layers read from and add to."""
    body = llama.model
    order = _order(llama.config.hidden_size, body.embed_tokens.weight.device, generator)
    readers, writers, norms = [body.embed_tokens], [], [body.norm]
    if llama.lm_head.weight is not body.embed_tokens.weight:
        readers.append(llama.lm_head)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers += [
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            mlp.gate_proj,
            mlp.up_proj,
        ]
        writers += [attention.o_proj, mlp.down_proj]
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    _permute_columns(readers, order)
    _permute_rows([*writers, *norms], order)


def _permute_hidden(mlp: Any, generator: torch.Generator) -> None:
    order = _order(mlp.down_proj.in_features, mlp.down_proj.weight.device, generator)
    _permute_rows([mlp.gate_proj, mlp.up_proj], order)
    _permute_columns([mlp.down_proj], order)


def _rotate_values(attention: Any, config: Any, generator: torch.Generator) -> None:
    """Attention mixes tokens, not the channels of a value: R goes into v, its inverse into o."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    v, o = attention.v_proj, attention.o_proj
    size = v.out_features // groups
    rotation = torch.stack([_orthogonal(size, generator) for _ in range(groups)])
    rotation = rotation.to(v.weight.device)  # [groups, size, size]
    rows = v.weight.double().view(groups, size, -1)
    v.weight.copy_((rotation @ rows).flatten(0, 1))
    if v.bias is not None:
        bias = v.bias.double().view(groups, size, 1)
        v.bias.copy_((rotation @ bias).flatten())
    # Query heads that share a key-value head lie side by side.
    shared = rotation.repeat_interleave(heads // groups, dim=0)  # [heads, size, size]
    columns = o.weight.double().view(-1, heads, 1, size)
    o.weight.copy_((columns @ shared.transpose(1, 2)).flatten(1))


def _permute_columns(modules: Sequence[Any], order: Tensor) -> None:
    for module in modules:
        module.weight.copy_(module.weight[:, order])


def _permute_rows(modules: Sequence[Any], order: Tensor) -> None:
    for module in modules:
        module.weight.copy_(module.weight[order])
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(module.bias[order])


def _order(size: int, device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator).to(device)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniform over the group (Mezzadri 2007, arXiv:math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation
