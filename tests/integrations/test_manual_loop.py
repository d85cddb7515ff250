"""An attached model against Llama written out by hand over `CacheManager`."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import less_cache as lc
from tests.integrations.models import less, model_of, positions, prompts


def by_hand(model, manager, state, ids, mask, place):
    """Llama's logits [B, S, vocabulary], attention by `manager.append`."""
    decoder = model.model
    x = decoder.embed_tokens(ids)
    cos, sin = decoder.rotary_emb(x, place)
    for i, layer in enumerate(decoder.layers):
        attention, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            projection(y).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        out = manager.attend(state, i, q, k, v, mask[:, -ids.shape[1] :])
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["paper", "exp"])
@pytest.mark.parametrize("policy", [lc.H2O(recent=2), lc.SinkWindow(sinks=2, recent=3)])
@torch.no_grad()
def test_same_as_a_loop_by_hand(policy, kind, backend):
    model = model_of("llama")
    config, maps = less(model, policy=policy, kind=kind)
    manager = lc.CacheManager(config, maps, backend=backend)
    state = manager.init(3)
    ids, mask = prompts([12, 7, 9])
    place = positions(mask)
    with lc.attach(model, config, maps, backend) as handle:
        assert handle.manager.backend == manager.backend
        cache = handle.new_cache()
        for start, stop in [(0, 8), (8, 10), (10, 11), (11, 12)]:
            inputs = ids[:, start:stop], mask[:, :stop], place[:, start:stop]
            expected = by_hand(model, manager, state, *inputs)
            found = model(
                inputs[0], attention_mask=inputs[1], position_ids=inputs[2], past_key_values=cache
            ).logits
            real = mask[:, start:stop].bool()
            torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    for mine, other in zip(cache.state.layers, state.layers, strict=True):
        for name, array in mine.arrays().items():
            assert torch.equal(array, getattr(other, name)), name
    assert all((layer.z > 0).any() for layer in state.layers)


@torch.no_grad()
def test_generate_is_the_greedy_loop():
    model = model_of("llama")
    config, maps = less(model)
    manager = lc.CacheManager(config, maps)
    state = manager.init(2)
    ids, mask = prompts([10, 6])
    sequence, new = ids, ids
    for _ in range(8):
        logits = by_hand(model, manager, state, new, mask, positions(mask)[:, -new.shape[1] :])
        new = logits[:, -1].argmax(1, keepdim=True)
        sequence = torch.cat([sequence, new], 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with lc.attach(model, config, maps):
        found = model.generate(ids, attention_mask=prompts([10, 6])[1], **settings)
    own = model.generate(ids, attention_mask=prompts([10, 6])[1], **settings)
    assert torch.equal(found, sequence)
    assert not torch.equal(found, own), "a cache of 6 pairs must be felt"
