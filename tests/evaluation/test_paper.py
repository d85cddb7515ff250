"""The paper's settings."""

import types

import pytest

import less_cache as lc
from less_cache.evaluation.paper import PUBLISHED, TABLES, cache_for


def shapes(positions):
    return types.SimpleNamespace(
        model_type="llama",
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        hidden_size=64,
        head_dim=16,
        max_position_embeddings=positions,
        get_text_config=lambda **_: shapes(positions),
    )


@pytest.mark.parametrize(
    ("positions", "policy", "share", "extra", "heavy", "recent"),
    [
        # As the scripts of the official code have them: --heavy_ratio and --recent_ratio.
        (4096, "h2o", 0.05, 0, int(0.025 * 4096), int(0.025 * 4096)),
        (4096, "h2o", 0.05, 4, int(0.0255 * 4096), int(0.0255 * 4096)),
        (2048, "h2o", 0.1, 0, int(0.05 * 2048), int(0.05 * 2048)),
        (2048, "h2o", 0.1, 4, int(0.051 * 2048), int(0.051 * 2048)),
        (4096, "lambda", 0.05, 0, int(0.001 * 4096), int(0.049 * 4096)),
        (4096, "h2o", 0.02, 0, 40, 40),
        (1000, "lambda", 0.05, 4, 1, 53),
    ],
)
def test_caches_are_those_of_the_official_code(positions, policy, share, extra, heavy, recent):
    config = cache_for(shapes(positions), policy, share, extra=extra)
    assert config.capacity == heavy + recent + 1
    if policy == "h2o":
        assert config.policies[0] == lc.H2O(recent=recent)
    else:
        assert config.policies[0] == lc.SinkWindow(sinks=heavy)
    assert config.rank == 0
    assert cache_for(shapes(positions), policy, share, rank=8).rank == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("tova", 0.05), "policy: got 'tova'"),
        (("h2o", 0.0), "share: got 0"),
        (("h2o", 0.001), "leaves no token"),
    ],
)
def test_what_the_paper_has_not_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        cache_for(shapes(512), *given)


def test_the_papers_gap_recovered_is_what_its_text_says():
    def figure(cache, share=None, policy=""):
        return PUBLISHED["wikitext", policy, share, cache][1]

    full, alone = figure("full cache"), figure("policy alone", 0.02, "h2o")
    share = (alone - figure("LESS", 0.02, "h2o")) / (alone - full)
    assert round(share, 2) == 0.57
    assert {table for table, *_ in PUBLISHED} <= set(TABLES)
