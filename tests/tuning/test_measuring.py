"""A head's loss is what decoding with that head's slots alone cut loses."""

import pytest
import torch

import less_cache as lc

pytest.importorskip("transformers")

from less_cache.evaluation.perplexity import Window
from less_cache.tuning.measuring import measure_heads
from tests.integrations.models import build


def windows(length=24, count=2):
    draw = torch.Generator().manual_seed(0)
    return [Window(f"d{i}", torch.randint(3, 90, (length,), generator=draw)) for i in range(count)]


def mean_loss(model, config, cut):
    total = 0.0
    with lc.attach(model, config, scoring=True), torch.no_grad():
        for window in cut:
            ids = window.ids.unsqueeze(0)
            logits = model(ids).logits[0, :-1].log_softmax(1)
            total -= float(logits.gather(1, ids[0, 1:, None]).sum())
    return total / sum(len(window.ids) - 1 for window in cut)


@pytest.mark.parametrize("quantization", [None, lc.Quantization(2, 2)])
def test_each_head_is_cut_alone(quantization):
    model, cut = build("llama"), windows()
    config = lc.CacheConfig.from_model(
        model.config, capacity=8, policy=lc.SinkWindow(2), rank=0, quantization=quantization
    )
    found = measure_heads(model, cut, config, [4, 9], progress=False)
    assert len(found.curves) == config.num_layers
    whole = [[24] * config.kv_heads for _ in range(config.num_layers)]
    assert found.full == pytest.approx(
        mean_loss(model, config.replace(capacity=whole), cut), abs=1e-4
    )
    for layer, row in enumerate(found.curves):
        assert len(row) == config.kv_heads
        for head, curve in enumerate(row):
            assert sorted(curve) == [4, 9, 24]
            assert curve[24] == 0.0
            capacities = [[*entry] for entry in whole]
            capacities[layer][head] = 4
            alone = mean_loss(model, config.replace(capacity=capacities), cut)
            assert curve[4] == pytest.approx(alone - found.full, abs=1e-4)


def test_what_cannot_be_measured_is_refused():
    model = build("llama")
    config = lc.CacheConfig.from_model(model.config, capacity=8, policy=lc.SinkWindow(2), rank=0)
    with pytest.raises(ValueError, match="config: rank is 4, expected 0"):
        measure_heads(model, windows(), config.replace(rank=4), [4])
    with pytest.raises(ValueError, match=r"windows: of lengths \[20, 24\]"):
        measure_heads(model, windows() + windows(20), config, [4])
    with pytest.raises(ValueError, match="slots: got none"):
        measure_heads(model, windows(), config, [])
    with pytest.raises(ValueError, match="slots: got 24"):
        measure_heads(model, windows(), config, [24])
