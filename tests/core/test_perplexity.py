"""Perplexity, its standard error, and differences of two, against the definitions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from metric_models import VOCABULARY, Bigram, text
from torch import nn

from ao_core.errors import ModelError, OptionError
from ao_core.metrics import (
    Perplexity,
    delta_nll,
    perplexity,
)


class Summing(nn.Module):
    """Logits depend on the whole window so far: the score of a token shows its context."""

    def forward(self, ids):
        total = ids.cumsum(-1).float()
        return torch.sin(total[..., None] * torch.arange(1.0, VOCABULARY + 1))


def numpy_nll(logits, target):
    logits = np.asarray(logits, dtype=np.float64)
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


# perplexity


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_perplexity_scores_all_but_the_first_token_of_each_window(batch_size):
    model, tokens = Bigram(), text(43)
    found = perplexity(model, tokens, context=10, batch_size=batch_size)
    table = model.table.detach().numpy()
    scores = [
        [numpy_nll(table[tokens[i - 1]], tokens[i]) for i in range(start + 1, start + 10)]
        for start in (0, 10, 20, 30)
    ]
    means = np.mean(scores, axis=1)
    assert found.tokens_scored == 36
    assert found.counts == [9] * 4
    np.testing.assert_allclose(found.windows, means, rtol=1e-6)
    assert found.nll == pytest.approx(np.mean(scores), rel=1e-6)
    assert found.perplexity == pytest.approx(np.exp(np.mean(scores)), rel=1e-6)
    assert found.nll_se == pytest.approx(means.std(ddof=1) / 2, rel=1e-6)
    assert found.ppl_se == pytest.approx(found.perplexity * found.nll_se)


@pytest.mark.parametrize(("context", "stride"), [(8, 3), (8, 7), (8, 1), (5, 4)])
def test_overlapping_windows_score_each_token_once_with_the_most_context(context, stride):
    tokens = text(29)
    found = perplexity(Summing(), tokens, context=context, stride=stride)
    windows = (29 - context) // stride + 1
    ends = context + (windows - 1) * stride  # the rest is shorter than a stride
    scores = []
    for i in range(1, ends):
        reached = next(k for k in range(windows) if k * stride + context > i)
        total = float(tokens[reached * stride : i].sum())
        logits = np.sin(np.float32(total) * np.arange(1, VOCABULARY + 1, dtype=np.float32))
        scores.append(numpy_nll(logits, tokens[i]))
    assert found.tokens_scored == ends - 1 == sum(found.counts)
    assert found.nll == pytest.approx(np.mean(scores), rel=1e-5)
    assert len(found.windows) == windows


def test_standard_error_weights_windows_by_their_tokens():
    found = perplexity(Bigram(), text(29), context=8, stride=3)
    means, counts = np.array(found.windows), np.array(found.counts)
    n = len(means)
    squares = ((counts * (means - found.nll)) ** 2).sum() * n / (n - 1)
    assert found.nll_se == pytest.approx(np.sqrt(squares) / counts.sum())


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = Bigram()
    nn.init.zeros_(model.table)
    found = perplexity(model, text(), context=10)
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert found.nll_se == pytest.approx(0.0, abs=1e-7)


def test_one_window_has_no_standard_error():
    found = perplexity(Bigram(), text(10), context=10)
    assert len(found.windows) == 1
    assert math.isnan(found.nll_se)
    assert math.isfinite(found.perplexity)


def test_low_precision_logits_are_scored_in_float32():
    class Wide(Bigram):
        def forward(self, ids):
            return super().forward(ids).half() * 100

    model = Wide()
    found = perplexity(model, text(), context=10)
    table = (model.table.detach().half() * 100).float().numpy()
    tokens = text()
    first = np.mean([numpy_nll(table[tokens[i - 1]], tokens[i]) for i in range(1, 10)])
    assert found.windows[0] == pytest.approx(first, rel=1e-6)


def test_impossible_tokens_give_an_infinite_perplexity():
    model = Bigram()
    with torch.no_grad():
        model.table[:, 0] = -math.inf
    assert perplexity(model, text(), context=10).perplexity == math.inf


def test_outputs_with_logits_and_no_cache_option():
    inner = Bigram()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.caches = inner, []

        def forward(self, input_ids, use_cache=True):
            self.caches.append(use_cache)
            return SimpleNamespace(logits=self.inner(input_ids))

    model = Wrapped()
    assert perplexity(model, text(), context=10) == perplexity(inner, text(), context=10)
    assert not any(model.caches)


def test_the_mode_of_every_module_is_put_back():
    model = nn.Sequential(Bigram(), nn.Dropout(0.9))
    model.train()
    model[0].eval()
    first = perplexity(model, text(), context=10)
    assert first == perplexity(model, text(), context=10)
    assert [m.training for m in model.modules()] == [True, False, True]
    with pytest.raises(ModelError):
        perplexity(nn.Sequential(Bigram(), nn.Flatten()).train(), text(), context=10)


def test_progress_counts_windows():
    calls = []
    perplexity(Bigram(), text(50), context=10, batch_size=2, progress=lambda *call: calls.append(call))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_nan_logits_name_the_window():
    class Broken(Bigram):
        def forward(self, ids):
            logits = super().forward(ids)
            return logits * math.nan if len(self.seen) == 3 else logits

    with pytest.raises(ModelError, match=r"NaN logits in the window of tokens 20 to 29"):
        perplexity(Broken(), text(), context=10)
    with pytest.raises(ModelError, match=r"NaN logits in the window of tokens 8 to 17"):
        perplexity(Broken(), text(), context=10, stride=4)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(0, dtype=torch.int64), "0 tokens and one window takes 10"),
        (text(9), "9 tokens and one window takes 10"),
        (text(40).view(4, 10), r"one dimension, found torch.int64 of shape \(4, 10\)"),
        (text(40).float(), "must be integers"),
        (text(40) - 1, "from -1 to"),
        (text(40) + 1, "tokenizer"),
    ],
)
def test_perplexity_refuses_tokens(tokens, words):
    model = Bigram()
    model.config = SimpleNamespace(vocab_size=VOCABULARY)
    with pytest.raises(ModelError, match=words):
        perplexity(model, tokens, context=10)
    assert model.seen == []


@pytest.mark.parametrize(
    "options",
    [
        {"context": 1},
        {"context": 10, "stride": 0},
        {"context": 10, "stride": 11},
        {"context": 10, "batch_size": 0},
        {"context": 33},
    ],
)
def test_perplexity_refuses_options(options):
    model = Bigram()
    model.config = SimpleNamespace(max_position_embeddings=32)
    with pytest.raises(OptionError):
        perplexity(model, text(), **options)


def test_logits_must_cover_the_tokens():
    class Narrow(Bigram):
        def forward(self, ids):
            return super().forward(ids)[..., :4]

    with pytest.raises(ModelError, match="has no logit, the model returned 4"):
        perplexity(Narrow(), text(), context=10)


# differences


def measured(windows, counts):
    return Perplexity(0.0, 0.0, 0.0, 0.0, windows, counts, sum(counts))


def test_delta_is_paired_over_windows():
    generator = np.random.default_rng(0)
    a = generator.normal(3.0, 1.0, 24)
    b = a + generator.normal(0.1, 0.01, 24)  # windows differ much more than the models do
    found = delta_nll(measured(list(a), [511] * 24), measured(list(b), [511] * 24))
    assert found.mean == pytest.approx((b - a).mean())
    assert found.se == pytest.approx((b - a).std(ddof=1) / np.sqrt(24))
    assert found.se < 0.005


def test_delta_of_real_measurements_is_other_minus_reference():
    one, two = Bigram(0), Bigram(1)
    a, b = (perplexity(model, text(), context=10) for model in (one, two))
    assert delta_nll(a, b).mean == pytest.approx(b.nll - a.nll)
    assert delta_nll(a, a) == delta_nll(b, b)
    assert delta_nll(a, a).mean == delta_nll(a, a).se == 0.0


def test_delta_needs_the_same_windows():
    with pytest.raises(ValueError, match="2 of 18 tokens and 3 of 27"):
        delta_nll(measured([1.0] * 2, [9] * 2), measured([1.0] * 3, [9] * 3))
