"""Tokens a second, by a clock that is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from metric_models import VOCABULARY, Bigram, text
from torch import nn

from ao_core.errors import ModelError, OptionError
from ao_core.metrics import model_bytes, perplexity
from ao_core.token_speed import speed


class Cached(nn.Module):
    """Looks like a causal model with a cache: the cache is the list of tokens so far."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = Bigram(), []

    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        self.calls.append((tuple(input_ids.shape), past_key_values, use_cache, logits_to_keep))
        cache = [*(past_key_values or []), *input_ids[0].tolist()]
        logits = self.inner(input_ids)[:, -logits_to_keep:]
        return SimpleNamespace(logits=logits, past_key_values=cache)


class Renamed(Cached):
    """As transformers names it from 5.24 or so on; the old name warns."""

    def forward(self, input_ids, cache=None, use_cache=None, logits_to_keep=0):
        output = super().forward(input_ids, cache, use_cache, logits_to_keep)
        return SimpleNamespace(logits=output.logits, cache=output.past_key_values)


@pytest.mark.parametrize("of_model", [Cached, Renamed])
def test_speed_decodes_greedily_through_the_cache(of_model):
    model, tokens = of_model(), text()
    found = speed(model, tokens, prefill=12, decode=4, repeats=2)
    assert found.prefill_tokens_per_s > 0
    assert found.decode_tokens_per_s is not None
    assert found.decode_tokens_per_s > 0
    expected = tokens[:12].tolist()
    for _ in range(4):
        expected.append(int(model.inner.table[expected[-1]].argmax()))
    run = model.calls[5:]
    assert [shape for shape, *_ in run] == [(1, 12)] + [(1, 1)] * 4
    assert run[-1][1] == expected[:-1]
    assert all(call[2:] == (True, 1) for call in model.calls)


def test_speed_without_a_cache_is_prefill_only():
    found = speed(Bigram(), text(), prefill=8, repeats=1)
    assert found.prefill_tokens_per_s > 0
    assert found.decode_tokens_per_s is None


def test_speed_counts_tokens_a_second(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 20.0, 30.0, 32.0, 40.0, 60.0])
    monkeypatch.setattr("ao_core.token_speed.time.perf_counter", lambda: next(clock))
    found = speed(Cached(), text(), prefill=8, decode=5, repeats=2)
    assert found.prefill_tokens_per_s == 8 / 2.0
    assert found.decode_tokens_per_s == 5 / 10.0


def test_speed_refuses():
    model = Cached()
    model.config = SimpleNamespace(max_position_embeddings=16)
    with pytest.raises(OptionError, match="1 or more"):
        speed(model, text(), prefill=0)
    with pytest.raises(OptionError, match="18 tokens at once exceed the model's 16 positions"):
        speed(model, text(), prefill=10, decode=8)
    with pytest.raises(ModelError, match="5 tokens and one window takes 8"):
        speed(model, text(5), prefill=8, decode=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    model = Bigram().cuda()
    on_host = perplexity(Bigram(), text(), context=10)
    assert perplexity(model, text(), context=10).nll == pytest.approx(on_host.nll, rel=1e-5)
    assert speed(model, text(), prefill=8).prefill_tokens_per_s > 0
    assert model_bytes(model).total == VOCABULARY**2 * 4
