"""An attached model under autocast."""

import pytest
import torch

import less_cache as lc
from tests.integrations.models import build, less, prompts


@pytest.mark.parametrize("scoring", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_new"])
def test_autocast_is_as_near_as_the_model_in_bfloat16(family, scoring):
    # Weights of a usual size: at 0.3 rounding alone moves logits by their own size.
    model = build(family, initializer_range=0.05)
    config, maps = less(model, capacity=9, rank=8)
    ids, _ = prompts([12, 12])

    def logits(model):
        with torch.no_grad(), lc.attach(model, config, maps, scoring=scoring) as handle:
            cache = handle.new_cache()
            steps = [(0, 6), (6, 7), (7, 11), (11, 12)]
            found = [model(ids[:, a:b], past_key_values=cache).logits for a, b in steps]
        return torch.cat(found, 1).float(), cache.state.layers[0]

    exact, _ = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, state = logits(model)
    narrow, _ = logits(model.to(torch.bfloat16))
    assert state.keys.dtype == torch.bfloat16
    assert state.H.dtype == torch.float32
    size = exact.abs().max()
    bound = 2 * (narrow - exact).abs().max() + 2**-6 * size
    assert bound < 0.2 * size
    assert (mixed - exact).abs().max() <= bound
    assert (mixed - narrow).abs().max() <= 2 * bound


def test_gradients_under_autocast():
    model = build("llama", initializer_range=0.05)
    config, maps = less(model, rank=8)
    ids, _ = prompts([17, 17])
    gradients = []
    with lc.attach(model, config, maps, scoring=True):
        for enabled in (False, True):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact, mixed = gradients
    assert (mixed - exact).norm() < 0.1 * exact.norm()
