"""Decoding with a SmolLM2-135M-shaped model on a CPU, eager and compiled, quantized against float."""

from __future__ import annotations

import copy

import pytest
import torch
from timing import interleaved

import ao_core as ao
from ao_core.causal import cache_name

transformers = pytest.importorskip("transformers")
FOUR_BITS = ("int4-weight-only", "int8-dynamic-int4-weight", "nf4")
STEPS, PROMPT, ROOM = 16, 64, 512  # ROOM: tokens in the cache, enough for every run


@pytest.fixture(scope="module")
def model():
    """SmolLM2-135M's shape with random weights, in bfloat16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize(
    "scheme",
    [
        "int8-weight-only",
        "int8-dynamic",
        "int4-weight-only",
        "int8-dynamic-int4-weight",
        "nf4",
        "float8-weight-only",
    ],
)
def test_decode(benchmark, model, scheme, mode):
    quantized = copy.deepcopy(model)
    ao.quantize_(quantized, scheme)
    torch._dynamo.reset()
    runs = [_decoder(each, compiled=mode == "compiled") for each in (model, quantized)]
    with torch.no_grad():
        first, second = (run() for run in runs)
        # Random weights: 4 bits leave little more than 10 dB after 30 layers.
        assert ao.sqnr(first.double(), second.double()) > (5 if scheme in FOUR_BITS else 15)
        float_s, quantized_s = interleaved(*runs, rounds=5)
        benchmark.group = f"decode, SmolLM2-135M shape, bfloat16, {mode}"
        benchmark.extra_info["float_tokens_per_s"] = STEPS / float_s
        benchmark.extra_info["tokens_per_s"] = STEPS / quantized_s
        benchmark.extra_info["ratio_to_float"] = float_s / quantized_s
        benchmark.pedantic(runs[1], rounds=3)


def _decoder(model, *, compiled):
    """A function that reads a prompt and decodes a few tokens with a static cache."""
    forward = torch.compile(model.forward, fullgraph=True) if compiled else model.forward
    token = torch.tensor([[7]])
    with torch.no_grad():
        name = cache_name(model(input_ids=token))
        cache = {name: transformers.StaticCache(config=model.config, max_cache_len=ROOM)}
        model(input_ids=torch.arange(PROMPT)[None], **cache)

    def run():
        for _ in range(STEPS):
            out = forward(input_ids=token, **cache)
        return out.logits

    return run
