"""A compiled decode step: one graph, whatever the position."""

import pytest
import torch
import torch._dynamo.testing

import less_cache as lc
from tests.integrations.models import less, model_of, prompts


@pytest.mark.parametrize("policy", [lc.H2O(recent=2), lc.SinkWindow(sinks=1, recent=2)])
@torch.no_grad()
def test_decode_step_in_one_graph(policy):
    model = model_of("llama")
    config, maps = less(model, policy=policy)
    ids, _ = prompts([16, 16])
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    with lc.attach(model, config, maps) as handle:
        step = torch.compile(model.forward, fullgraph=True, backend=counter)
        plain, compiled = handle.new_cache(), handle.new_cache()
        for cache in (plain, compiled):
            model(ids[:, :8], past_key_values=cache)
        for i in range(8, 16):
            expected = model(ids[:, i : i + 1], past_key_values=plain).logits
            found = step(ids[:, i : i + 1], past_key_values=compiled).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert compiled.get_seq_length() == plain.get_seq_length() == 16
    # The first step takes the tokens seen for a constant, the second for a variable.
    assert counter.frame_count <= 2
    torch.compiler.reset()
