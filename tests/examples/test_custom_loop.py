"""The example's decoder and loop, on a tiny model."""

import pytest
import torch
import typer
from torch.nn import functional as F
from typer.testing import CliRunner

import less_cache as lc
from examples.custom_loop import Decoder, Shape, generate, main

SHAPE = Shape(
    vocabulary=50,
    layers=2,
    hidden=32,
    intermediate=48,
    query_heads=4,
    kv_heads=2,
    head_dim=8,
)


def cache(policy, capacity, rank=0):
    config = lc.CacheConfig(SHAPE.layers, 4, 2, 8, capacity, policy, rank=rank, hidden=16)
    maps = lc.FeatureMaps.initialise(config) if rank else None
    manager = lc.CacheManager(config, maps)
    state = manager.init(3)
    return state, lambda layer, q, k, v: manager.attend(state, layer, q, k, v)


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return Decoder(SHAPE).eval()


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(1))


def causal(layer, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_a_loop_with_a_full_cache_gives_what_one_pass_over_everything_gives(decoder, prompt):
    _, attend = cache(lc.FullCache(), 20)
    tokens, seconds = generate(decoder, attend, prompt, 10, temperature=1.0)
    assert tokens.shape == (3, 10)
    assert seconds > 0

    generator = torch.Generator().manual_seed(0)
    so_far = prompt
    with torch.inference_mode():
        for step in range(10):
            logits = decoder(so_far, 0, causal)
            drawn = torch.multinomial(logits.softmax(1), 1, generator=generator)
            assert torch.equal(drawn[:, 0], tokens[:, step])
            so_far = torch.cat([so_far, drawn], 1)


def test_a_less_cache_keeps_its_size(decoder, prompt):
    state, attend = cache(lc.H2O(), 6, rank=2)
    size = state.nbytes
    tokens, _ = generate(decoder, attend, prompt, 12)
    assert tokens.shape == (3, 12)
    assert state.nbytes == size
    assert state.length.tolist() == [18, 18, 18]
    assert all(bool((layer.z > 0).all()) for layer in state.layers)


def test_the_last_token_stands_where_it_says(decoder, prompt):
    """Positions go on from `start`: prompt and step together are one pass over both."""
    _, attend = cache(lc.FullCache(), 20)
    with torch.inference_mode():
        decoder(prompt[:, :6], 0, attend)
        last = decoder(prompt[:, 6:], 6, attend)
        torch.testing.assert_close(last, decoder(prompt, 0, causal))


@pytest.mark.parametrize("rank", [0, 4])
def test_the_script_runs(rank):
    app = typer.Typer()
    app.command()(main)
    arguments = ["--prompt-tokens=20", "--new-tokens=5", "--batch=1", "--capacity=8"]
    result = CliRunner().invoke(app, [*arguments, f"--rank={rank}"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "tokens/s" in result.output
    assert "cache at 25 tokens" in result.output
