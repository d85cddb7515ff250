from __future__ import annotations

import pytest
import torch

import less_cache as lc
from less_cache.teacher_forced import attend
from less_cache.training.collect import collect_layer
from tests.integrations.models import FAMILIES, model_of

DENSE = [name for name in FAMILIES if name != "granite"]


@pytest.mark.parametrize("family", DENSE)
def test_collected_attention_is_the_models_own(family):
    """Projected, the collected output is what the attention module adds to the residual stream."""
    model = model_of(family)
    config = lc.CacheConfig.from_model(
        model.config, capacity=6, policy=lc.SinkWindow(sinks=1), rank=0, dtype=torch.float32
    )
    tokens = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    layer = config.num_layers - 1
    data = collect_layer(model, tokens, layer, config.layer(layer), batch=2, progress=False)
    from less_cache.integrations.transformers.model_check import attention_modules

    module = attention_modules(model)[layer]
    seen = []
    hook = module.register_forward_hook(lambda *call: seen.append(call[-1][0]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    hook.remove()
    linear = module.o_proj if hasattr(module, "o_proj") else module.dense
    bias = 0 if linear.bias is None else linear.bias.detach()
    torch.testing.assert_close(data.project(data.out) + bias, seen[0], rtol=1e-4, atol=1e-5)
    never = torch.full_like(data.times, tokens.shape[1])
    whole = attend(config.layer(layer), None, data.q, data.k, data.v, never)
    torch.testing.assert_close(whole, data.out, rtol=1e-4, atol=1e-5)
