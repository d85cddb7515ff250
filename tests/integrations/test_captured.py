"""attach(cuda_graph=True): tokens of the uncaptured model, or a clear refusal; tapes for graphs."""

import pytest
import torch

import less_cache as lc
from tests.integrations.models import build, less, model_of, prompts
from tests.policies import MostSeen
from tests.tape import use_tapes

pytest.importorskip("triton")


@pytest.fixture
def tapes(monkeypatch):
    return use_tapes(monkeypatch)


def attached(model, config, maps, **given):
    return lc.attach(model, config, maps, "triton", **given)


def test_generate_gives_the_same_tokens(tapes):
    model = model_of("llama")
    config, maps = less(model)
    # On the right: each sequence goes on at a position of its own.
    ids, mask = prompts([7, 4], side="right")
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with attached(model, config, maps):
        wanted = model.generate(ids, attention_mask=mask, **settings)
    with attached(model, config, maps, cuda_graph=True):
        found = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(found, wanted)
    (tape,) = tapes
    # The prompt gives the first token, a pass as ever the second.
    assert tape.replays == 3
    assert "forward" not in vars(model)


@torch.no_grad()
def test_a_loop_of_ones_own_goes_on_with_a_cache(tapes):
    model = model_of("llama")
    config, maps = less(model, policy=lc.TOVA())
    ids, _ = prompts([6])
    with attached(model, config, maps) as plain:
        other = plain.new_cache()
        wanted = [model(ids[:, :3], past_key_values=other).logits[:, -1:]]
        wanted += [model(ids[:, i : i + 1], past_key_values=other).logits for i in range(3, 6)]
    with attached(model, config, maps, cuda_graph=True) as handle:
        cache = handle.new_cache()
        for _ in range(2):
            # A graph serves a cache that begins again.
            found = [model(ids[:, :3], past_key_values=cache).logits[:, -1:]]
            found += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3, 6)]
            assert all(map(torch.equal, found, wanted))
            assert cache.seen.number == 6
            assert torch.equal(cache.state.length, other.state.length)
            cache.reset()
        assert [tape.replays for tape in tapes] == [2 + 3]
        with torch.enable_grad():
            model(ids[:, :1], past_key_values=cache)
        assert len(tapes) == 1
        again = cache.clone()
        model(ids[:, :1], past_key_values=again)
        assert len(tapes) == 2
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids[:, :1], past_key_values=again, attention_mask=torch.ones(1, 9))


@pytest.mark.parametrize(
    ("family", "changes", "backend", "given", "reason"),
    [
        ("llama", {}, "torch", {}, "backend: got 'torch'"),
        ("llama", {}, "triton", {"scoring": True}, "scoring=True"),
        ("gemma2", {}, "triton", {}, "sliding-window"),
        ("falcon_new", {}, "triton", {}, "falcon"),
    ],
)
def test_what_has_no_graph_is_refused(tapes, family, changes, backend, given, reason):
    model = build(family, **changes)
    config, maps = less(model)
    with pytest.raises(ValueError, match=reason):
        lc.attach(model, config, maps, backend, cuda_graph=True, **given)
    lc.attach(model, config, maps, backend, **given).detach()


def test_policies_of_ones_own_and_other_devices_are_refused(monkeypatch):
    model = build("llama")
    config, maps = less(model)
    with pytest.raises(ValueError, match="model: on 'cpu', but a CUDA graph needs a CUDA device"):
        attached(model, config, maps, cuda_graph=True)
    use_tapes(monkeypatch)
    with pytest.raises(ValueError, match="policy: layer 0 has MostSeen"):
        lc.attach(model, *less(model, policy=MostSeen()), cuda_graph=True)
    with pytest.raises(ValueError, match=r"torch\.compile"):
        attached(torch.compile(model), config, maps, cuda_graph=True)
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    scaled = build("llama", rope_parameters=dynamic)
    with pytest.raises(ValueError, match="frequencies"):
        attached(scaled, *less(scaled), cuda_graph=True)
    with pytest.raises(TypeError, match="cuda_graph: got 1"):
        attached(model, config, maps, cuda_graph=1)
