"""A model run anew from one layer on predicts what the whole model predicts."""

import pytest
import torch

import less_cache as lc

pytest.importorskip("transformers")

from less_cache.integrations.transformers.interception import intercepted
from less_cache.training.collect import full_attention
from less_cache.tuning.measuring import TOLERANCE, by_head, measure_layer, never
from less_cache.tuning.replay import Replay
from tests.integrations.models import build

KINDS = ["llama", "gemma2", "falcon"]


def replay_of(kind, count=3, length=20):
    model = build(kind)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 90, (count, length), generator=draw)
    config = lc.CacheConfig.from_model(
        model.config, capacity=length, policy=lc.SinkWindow(1), rank=0
    )
    return Replay(model, tokens, config, batch=2), tokens


def divergence(model, tokens, config, index, out):
    """By the definition, all layers run."""
    given = iter(out.split(1))

    def attend(layer, q, k, v):
        return next(given) if layer == index else full_attention(config.layer(layer), q, k, v)

    total = 0.0
    for row in tokens:
        wanted = model(row.unsqueeze(0), use_cache=False).logits[0].double().softmax(1)
        with intercepted(model, attend):
            found = model(row.unsqueeze(0), use_cache=False).logits[0].double().softmax(1)
        total += float((wanted * (wanted.log() - found.log())).sum())
    return total / tokens.numel()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_same_as_running_every_layer(kind):
    replay, tokens = replay_of(kind)
    for index in range(replay.config.num_layers):
        text = replay.layer(index)
        assert replay.distance(text, text.out) == pytest.approx(0, abs=1e-6)
        other = text.out.roll(1, 3)
        wanted = divergence(replay.model, tokens, replay.config, index, other)
        assert replay.distance(text, other) == pytest.approx(wanted, rel=1e-3, abs=1e-7)
        assert wanted > 1e-6
    # Nothing of it stays with the model.
    before = replay.model(tokens, use_cache=False).logits
    assert torch.equal(before, build(kind)(tokens, use_cache=False).logits)


@torch.no_grad()
def test_heads_that_lose_are_told_apart():
    replay, _ = replay_of("llama")
    text = replay.layer(0)
    out = text.out.clone()
    group = text.q.shape[1] // text.k.shape[1]
    out[:, :group] += 3.0
    first, *others = by_head(replay, text, out)
    assert first > TOLERANCE
    assert others == pytest.approx([0.0] * len(others), abs=1e-6)


def test_fewer_slots_and_fewer_bits_lose_more():
    replay, tokens = replay_of("llama", count=4)
    found = measure_layer(replay, 0, [lc.SinkWindow(1)], [2, 4, 16])
    length = tokens.shape[1]
    for curve in found.evicting[lc.SinkWindow(1)]:
        assert curve[length] == 0.0
        assert set(curve) <= {2, 4, 16, length}
        assert min(curve) == 2
    assert found.keys == found.values == {}
    assert type(found).from_dict(found.to_dict()) == found
    assert never(replay.layer(0)).eq(length).all()


def test_policies_that_need_more_slots_are_measured_from_there_on():
    replay, _ = replay_of("llama")
    found = measure_layer(replay, 0, [lc.SinkWindow(4)], [2, 8])
    assert all(2 not in curve for curve in found.evicting[lc.SinkWindow(4)])
