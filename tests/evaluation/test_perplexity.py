from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import less_cache as lc
from less_cache.evaluation.perplexity import (
    Contestant,
    Scores,
    Window,
    cut_windows,
    recovery,
    score,
)
from tests.integrations.models import build


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture
def windows():
    draws = torch.Generator().manual_seed(0)
    return [Window(f"d{i % 2}", torch.randint(3, 97, (24,), generator=draws)) for i in range(5)]


@pytest.mark.parametrize("policy", [lc.H2O(), lc.SinkWindow(sinks=1), lc.TOVA()])
@pytest.mark.parametrize("rank", [0, 4])
def test_equals_decoding_token_by_token(model, windows, policy, rank):
    config = lc.CacheConfig.from_model(
        model.config, capacity=7, policy=policy, rank=rank, dtype=torch.float32
    )
    maps = lc.FeatureMaps.initialise(config, hidden=8) if rank else None
    found = score(model, windows, Contestant("it", config, maps), batch=2, progress=False)
    ids = torch.stack([window.ids for window in windows])
    steps = []
    with lc.attach(model, config, maps) as less, torch.no_grad():
        cache = less.new_cache()
        for t in range(ids.shape[1] - 1):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            log_likelihoods = out.logits[:, 0].log_softmax(1)
            steps.append(-log_likelihoods.gather(1, ids[:, t + 1 : t + 2]))
    torch.testing.assert_close(torch.stack(found.losses), torch.cat(steps, 1), rtol=0, atol=1e-4)


def test_the_full_cache_is_the_models_own(model, windows):
    found = score(model, windows, Contestant("full"), batch=3, progress=False)
    ids = windows[0].ids.unsqueeze(0)
    with torch.no_grad():
        wanted = model(ids, labels=ids).loss
    assert float(found.losses[0].mean()) == pytest.approx(float(wanted), rel=1e-5)


def scores_of(losses, documents):
    return Scores(Contestant("x"), [torch.tensor(row) for row in losses], documents)


def test_perplexity_counts_tokens_and_halves():
    found = scores_of([[1.0, 1.0, 2.0, 4.0], [3.0, 3.0]], ["a", "b"])
    assert found.perplexity() == pytest.approx(math.exp(14 / 6))
    assert found.perplexity(second_half=True) == pytest.approx(math.exp(9 / 3))
    positions, means = found.by_position(2)
    assert positions == [1.0, 3.0]
    assert means == [1.0, 3.0]


def test_recovery_is_the_share_of_the_gap_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    base = rng.uniform(1, 2, size=(40, 8))
    documents = [f"d{i % 20}" for i in range(40)]
    full = scores_of(base.tolist(), documents)
    policy = scores_of((base + 0.4).tolist(), documents)
    less = scores_of((base + 0.2 + rng.normal(size=(40, 1)) * 0.02).tolist(), documents)
    share = recovery(full, policy, less)
    a, b, c = (s.perplexity() for s in (full, policy, less))
    assert share.share == pytest.approx((b - c) / (b - a))
    assert share.low < share.share < share.high
    assert share.high - share.low < 0.2
    same = recovery(full, policy, policy)
    assert (same.share, same.low, same.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("more", [0.0, -0.1])
def test_where_the_policy_does_as_well_there_is_no_gap(more):
    base = np.random.default_rng(0).uniform(1, 2, size=(10, 8))
    documents = [f"d{i}" for i in range(10)]
    full = scores_of(base.tolist(), documents)
    policy = scores_of((base + more).tolist(), documents)
    less = scores_of((base + 0.2).tolist(), documents)
    assert recovery(full, policy, less) is None


def test_a_gap_that_the_documents_do_not_agree_on_is_none():
    documents = [f"d{i}" for i in range(10)]
    base = np.ones((10, 8))
    change = np.where(np.arange(10) % 2, 1.0, -0.98)[:, None]
    full, policy = (scores_of(x.tolist(), documents) for x in (base, base + change))
    assert policy.perplexity() > full.perplexity()
    assert recovery(full, policy, full) is None


def test_windows_do_not_overlap_and_short_text_is_refused():
    windows = cut_windows([("a", torch.arange(10)), ("b", torch.arange(3))], 4)
    assert [w.ids.tolist() for w in windows] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="10 tokens"):
        cut_windows([("a", torch.arange(10))], 11)
