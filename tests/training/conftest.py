"""A tiny model and text with structure, so that maps have something to learn."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import less_cache as lc
from less_cache.training import Recipe
from tests.integrations.models import build


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture(scope="session")
def tokens():
    draws = torch.Generator().manual_seed(3)
    return torch.randint(3, 97, (10, 48), generator=draws)


@pytest.fixture(scope="session")
def config():
    return lc.CacheConfig.from_model(
        build("llama").config, capacity=8, policy=lc.H2O(), rank=4, dtype=torch.float32
    )


@pytest.fixture(scope="session")
def recipe():
    return Recipe(
        kind="exp", hidden=8, epochs=3, rows=16, learning_rate=3e-3, schedule="cosine", dropout=0.2
    )


@pytest.fixture
def dies_after(monkeypatch):
    """The run in the block ends before one more step of a fit, each step so far in a checkpoint."""

    @contextmanager
    def dying(module, fit, steps):
        original, done = fit.step, 0

        def step(self, number):
            nonlocal done
            if done == steps:
                raise KeyboardInterrupt
            done += 1
            return original(self, number)

        with monkeypatch.context() as patch:
            patch.setattr(module, "SAVE_EVERY_SECONDS", -1.0)
            patch.setattr(fit, "step", step)
            with pytest.raises(KeyboardInterrupt):
                yield

    return dying
