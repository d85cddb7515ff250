"""Backends by name: had, or refused with what there is."""

import sys
import types

import pytest
import torch

import less_cache as lc
from less_cache.backends import BACKENDS, Entry, get_backend, register_backend
from tests.helpers import small_config


def test_every_backend_can_be_had_by_name():
    assert list(BACKENDS) == ["triton", "torch", "inductor", "reference"]
    for name in ("torch", "inductor", "reference"):
        assert callable(get_backend(name).attend)
    with pytest.raises(ValueError, match=r"^backend: got 'jax', expected one of 'triton', 'torch'"):
        get_backend("jax")


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_a_name_is_given_once(name):
    with pytest.raises(ValueError, match=r"^name: got"):
        register_backend(name, Entry("nowhere", ("cpu",)))


def test_a_backend_of_a_users_own_is_known_everywhere(monkeypatch):
    calls = []
    module = types.ModuleType("own_backend")
    module.check_config = lambda config: calls.append(config)
    module.prepare_maps = lambda maps, layer, device: None
    module.attend = lambda layer, arrays, maps, q, k, v, **_: q + 1
    monkeypatch.setitem(sys.modules, "own_backend", module)
    monkeypatch.setitem(BACKENDS, "own", Entry("own_backend", ("cpu",)))
    config = small_config(rank=0)
    manager = lc.CacheManager(config, backend="own")
    q, k, v = (torch.zeros(1, heads, 1, 4) for heads in (4, 2, 2))
    assert manager.attend(manager.init(1), 0, q, k, v).unique().tolist() == [1]
    assert calls
