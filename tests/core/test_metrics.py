"""Metrics against independent maths."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import ao_core as ao
from ao_core.errors import ModelError, OptionError
from ao_core.metrics import (
    Perplexity,
    delta_nll,
    model_bytes,
    perplexity,
    sparsity,
    speed,
    sqnr,
    stored_bytes,
)
from ao_core.timing import microseconds

VOCABULARY = 11


class Halved(torch.Tensor):
    """A wrapper subclass that says float32 and stores int8 codes and one scale a row."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):
        return cls(inner["codes"], inner["scale"])

    def dequantize(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


def halved(rows=8, columns=16):
    codes = torch.arange(rows * columns).remainder(100).to(torch.int8).view(rows, columns)
    return Halved(codes, torch.full((rows, 1), 0.5))


class Bigram(nn.Module):
    """Logits of a token depend on the token before it, by a table; counts what it was asked."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.seen: list[tuple[int, ...]] = []
        self.modes: list[bool] = []

    def forward(self, ids):
        self.seen.append(tuple(ids.shape))
        self.modes.append(self.training)
        return self.table[ids]


class Summing(nn.Module):
    """Logits depend on the whole window so far: the score of a token shows its context."""

    def forward(self, ids):
        total = ids.cumsum(-1).float()
        return torch.sin(total[..., None] * torch.arange(1.0, VOCABULARY + 1))


def text(n=40, seed=1):
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


def numpy_nll(logits, target):
    logits = np.asarray(logits, dtype=np.float64)
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


# sqnr


def test_sqnr_is_twenty_log_of_the_ratio_of_norms():
    x = torch.randn(63, 17)
    y = x + 0.01 * torch.randn(63, 17)
    a, b = x.double().numpy(), y.double().numpy()
    expected = 20 * np.log10(np.linalg.norm(a) / np.linalg.norm(a - b))
    assert sqnr(x, y) == pytest.approx(expected, abs=1e-9)


def test_sqnr_of_low_precision_is_computed_in_float64():
    x = torch.full((4096,), 300.0, dtype=torch.float16)  # its squares overflow float16
    assert sqnr(x, x * 0.5) == pytest.approx(20 * math.log10(2.0))


def test_sqnr_at_the_ends():
    x = torch.randn(5)
    assert sqnr(x, x.clone()) == math.inf
    assert sqnr(torch.zeros(5), torch.zeros(5)) == math.inf
    assert sqnr(torch.zeros(5), torch.ones(5)) == -math.inf
    assert sqnr(torch.tensor([1e-40]), torch.tensor([2e-40])) == pytest.approx(0.0, abs=1e-3)


def test_sqnr_dequantizes():
    weight = halved()
    assert sqnr(weight.dequantize(), weight) == math.inf


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), "one shape"),
        (torch.ones(1), torch.ones(2), "one shape"),
        (torch.ones(0), torch.ones(0), "at least one element"),
        (torch.tensor([math.nan]), torch.ones(1), "reference"),
        (torch.ones(1), torch.tensor([math.inf]), "approximation"),
    ],
)
def test_sqnr_refuses(x, y, words):
    with pytest.raises(ValueError, match=words):
        sqnr(x, y)


# bytes


def test_stored_bytes_counts_inner_tensors():
    assert stored_bytes(halved(8, 16)) == 8 * 16 * 1 + 8 * 4
    assert stored_bytes(torch.zeros(3, 5, dtype=torch.bfloat16)) == 30
    assert stored_bytes(torch.zeros(3, 0)) == 0


def test_stored_bytes_of_a_wrapper_in_a_wrapper():
    inner = halved(8, 16)
    assert stored_bytes(Halved(inner, torch.ones(8, 1))) == 8 * 16 + 8 * 4 + 8 * 4


def test_stored_bytes_counts_shared_memory_once():
    codes = torch.zeros(8, 16, dtype=torch.int8)
    assert stored_bytes(Halved(codes, codes)) == 128
    assert stored_bytes(Halved(codes[:6], codes[4:])) == 128  # rows 4 and 5 are in both
    assert stored_bytes(Halved(codes[:2], codes[6:])) == 64
    assert stored_bytes(torch.zeros(1, 4).expand(100, 4)) == 16
    assert stored_bytes(codes.t()) == 128


@pytest.mark.filterwarnings("ignore:Sparse")
def test_stored_bytes_of_sparse_tensors():
    dense = torch.eye(10)
    assert stored_bytes(dense.to_sparse_coo()) == 10 * 4 + 2 * 10 * 8
    assert stored_bytes(dense.to_sparse_csr()) == 10 * 4 + 10 * 8 + 11 * 8


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.first = nn.Linear(8, 8, bias=True)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.first.weight
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("kept", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("cache", torch.zeros(5, dtype=torch.int8), persistent=False)


def test_model_bytes_counts_tied_weights_once_and_all_buffers():
    found = model_bytes(Tied())
    assert found.by_dtype == {"float32": 4 * (400 + 64 + 8), "float64": 24, "int8": 5}
    assert found.total == 4 * (400 + 64 + 8) + 24 + 5
    assert found.linear_weights == 4 * 64  # the head is the embedding
    assert found.linear_elements == 64


def test_model_bytes_of_quantized_weights():
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.LayerNorm(8))
    model[0].weight = nn.Parameter(halved(8, 16), requires_grad=False)
    found = model_bytes(model)
    assert found.linear_weights == 128 + 32
    assert found.linear_elements == 128
    assert found.by_dtype == {"int8": 128, "float32": 32 + 2 * 8 * 4}


def test_model_bytes_of_views_into_one_buffer():
    flat = torch.zeros(64 + 64)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].weight = nn.Parameter(flat[:64].view(8, 8))
    model[1].weight = nn.Parameter(flat[64:].view(8, 8))
    assert model_bytes(model).total == 512


def test_model_bytes_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    assert model_bytes(model).total == 2 * 16 * 16 * 4


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


# speed


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


def test_speed_decodes_greedily_through_the_cache():
    model, tokens = Cached(), text()
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
    monkeypatch.setattr("ao_core.metrics.time.perf_counter", lambda: next(clock))
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


def test_microseconds_of_one_call():
    calls = []

    def slow():
        calls.append(1)
        time.sleep(0.002)

    found = microseconds([slow, slow], "cpu", replays=3)
    assert len(calls) == 7  # one that does not count, and three rounds of two
    assert found >= 2000  # what sleeping takes at least
    with pytest.raises(ValueError, match="at least one call"):
        microseconds([], "cpu")


def test_sparsity_counts_zeros_of_linears_once():
    """Tied heads are the embedding's; quantized weights count as they dequantize."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(10, 8), nn.Linear(8, 10, bias=False), nn.Linear(10, 3), nn.Linear(10, 3)
    )
    model[1].weight = model[0].weight
    model[3].weight = model[2].weight
    assert sparsity(model) == 0
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight[:, :5] = 0
    assert sparsity(model) == 0.5
    ao.quantize_(model, "int8-weight-only", include="2")
    assert sparsity(model) == 0.5
    assert math.isnan(sparsity(nn.Sequential(nn.ReLU())))
