"""The example on a local cluster; without Ray, that its text is cut as it asks."""

from __future__ import annotations

import pytest

from examples import ray_training


def test_the_arguments_are_those_of_train(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ray_training, "train", lambda *given, **named: seen.append((given, named)))
    ray_training.main(tmp_path)
    ((_, tokens, config, recipe, out), named) = seen[0]
    assert tokens.shape == (16, 96)
    assert config.capacity == 16
    assert recipe.epochs == 2
    assert out == tmp_path
    assert named["on"].address == "local"


def test_it_trains_every_layer(tmp_path):
    pytest.importorskip("ray", reason="needs Ray: make vllm sets up an environment with it")
    maps = ray_training.main(tmp_path, epochs=1)
    assert maps is not None
    assert all(layer is not None for layer in maps)
