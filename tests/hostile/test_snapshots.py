"""Snapshots that are damaged, impossible or someone else's: refused by path, or right."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import less_cache as lc
from tests.helpers import (
    POLICIES,
    assert_same_state,
    held_by,
    random_inputs,
    random_maps,
    small_config,
)

from .arrays import ODDITIES
from .files import DAMAGES, TENSOR_WAYS, VALUES, changed_at, contents, places, sign
from .rule import Refusal, files_below, outcome, refused, state_bits

EXAMPLES = 80


@functools.cache
def saved(policy=POLICIES[2]):
    """A manager, a state of it in use, and its snapshot's bytes."""
    room = 40 if isinstance(policy, lc.FullCache) else 6
    config = small_config(policy=policy, capacity=room, dtype="float64")
    manager = lc.CacheManager(config, random_maps(config))
    state = manager.init(3)
    go_on(manager, state, 9, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder) / "state")
        return manager, state, (Path(folder) / "state").read_bytes()


def go_on(manager, state, tokens, seed):
    rng = np.random.default_rng(seed)
    for layer in range(manager.config.num_layers):
        arrays = random_inputs(manager.config, state.batch_size, tokens, rng)
        mask = torch.as_tensor(rng.random((state.batch_size, tokens)) < 0.7)
        manager.attend(state, layer, *map(torch.as_tensor, arrays), mask)


def check_load(manager, path):
    """Load by the rule; what was loaded has to go on as the reference does."""
    folder = path.parent
    found = outcome(lambda: manager.load(path), str(path), unchanged=lambda: files_below(folder))
    if isinstance(found, Refusal):
        return found
    reference = lc.CacheManager(manager.config, manager.maps, backend="reference")
    twin = reference.load(path)
    if manager.config.policy.evicts:
        go_on(manager, found, 2, seed=3)
        go_on(reference, twin, 2, seed=3)
    for i, layer in enumerate(manager.config.layers):
        assert_same_state(held_by(found.layers[i], layer), held_by(twin.layers[i], layer), 1e-9)
    return found


@given(damage=DAMAGES, policy=st.sampled_from(POLICIES))
def test_damaged_bytes(damage, policy):
    manager, state, whole = saved(policy)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        path.write_bytes(damage(whole))
        found = check_load(manager, path)
        if path.read_bytes() == whole:
            assert state_bits(manager.load(path)) == state_bits(state)
        else:
            assert isinstance(found, Refusal), "taken, though a byte differs"


@pytest.mark.parametrize("way", TENSOR_WAYS)
@given(policy=st.sampled_from(POLICIES), seed=st.integers(0, 2**31), data=st.data())
def test_tensors_that_were_signed_anew(way, policy, seed, data):
    manager, _, whole = saved(policy)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        path.write_bytes(whole)
        header, tensors = contents(path)
        # Where the oldest leaves, the scores say what the positions say, and nobody reads both.
        by_age = isinstance(policy, lc.SinkWindow)
        names = [name for name in sorted(tensors) if not (by_age and name.endswith("scores"))]
        name = data.draw(st.sampled_from(names))
        spoilt = TENSOR_WAYS[way](tensors[name], np.random.default_rng(seed))
        sign(path, header, {**tensors, name: spoilt})
        found = check_load(manager, path)
        if spoilt.shape != tensors[name].shape or spoilt.dtype != tensors[name].dtype:
            assert isinstance(found, Refusal)
        if way == "poked" and not bool(torch.isfinite(spoilt).all()):
            assert isinstance(found, Refusal)


@given(policy=st.sampled_from(POLICIES), value=VALUES, data=st.data())
def test_headers_that_were_signed_anew(policy, value, data):
    manager, state, whole = saved(policy)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        path.write_bytes(whole)
        header, tensors = contents(path)
        field = data.draw(st.sampled_from(["config", "tokens_bound", *sorted(header)]))
        kind = data.draw(st.sampled_from(["inside", "text", "missing", "deep"]))
        if kind == "inside" and field in ("config", "tokens_bound"):
            inner = json.loads(header[field])
            place = data.draw(st.sampled_from(places(inner)))
            remove = data.draw(st.booleans())
            header[field] = json.dumps(changed_at(inner, place, value, remove=remove))
        elif kind == "missing":
            header.pop(field)
        elif kind == "deep":
            header[field] = "[" * 100_000
        else:
            header[field] = json.dumps(value)
        sign(path, header, tensors)
        found = check_load(manager, path)
        if isinstance(found, Refusal):
            # Without a manager that knows better, what the file itself says has to hold.
            outcome(lambda: lc.CacheState.load(path, maps=manager.maps), str(path))
        else:
            assert found.config == state.config


BOUNDS = (
    "3",
    "[]",
    "[9]",
    "[9, null]",
    '["9", 9]',
    "[9.5, 9]",
    "[true, 9]",
    "[-1, 9]",
    "{}",
    "[9, 9, 9]",
)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_bounds_that_are_no_counts(tmp_path, bounds):
    manager, _, whole = saved()
    path = tmp_path / "state"
    path.write_bytes(whole)
    header, tensors = contents(path)
    sign(path, {**header, "tokens_bound": bounds}, tensors)
    refused(lambda: manager.load(path), str(path), unchanged=lambda: files_below(tmp_path))


@given(data=st.data(), extra=st.booleans())
def test_tensors_too_few_or_too_many(data, extra):
    manager, _, whole = saved()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        path.write_bytes(whole)
        header, tensors = contents(path)
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name] if extra else tensors.pop(name)
        if extra:
            tensors[data.draw(st.sampled_from(["x", "layers.9.z", f"{name}.x"]))] = tensor.clone()
        sign(path, header, tensors)
        assert isinstance(check_load(manager, path), Refusal)


@pytest.mark.parametrize("claimed", ["num_layers", "kv_heads", "query_heads", "capacity", "rank"])
@pytest.mark.parametrize("number", [10**8, 10**12, 2**70])
def test_small_files_that_claim_much(tmp_path, claimed, number):
    manager, _, whole = saved()
    path = tmp_path / "state"
    path.write_bytes(whole)
    header, tensors = contents(path)
    config = json.loads(header["config"])
    header["config"] = json.dumps({**config, claimed: number})
    sign(path, header, tensors)
    refused(lambda: manager.load(path), str(path), unchanged=lambda: files_below(tmp_path))
    refused(lambda: lc.CacheState.load(path, maps=manager.maps), str(path))


def test_paths_that_are_none(tmp_path):
    manager, state, _ = saved()
    for odd in ODDITIES:
        if isinstance(odd, str):
            continue
        refused(lambda: manager.load(odd), "path")  # noqa: B023
        refused(lambda: state.save(odd), "path", unchanged=lambda: files_below(tmp_path))  # noqa: B023
    for name in ("nothing", "", "\0", "a" * 300, "a/b"):
        refused(lambda: manager.load(f"{tmp_path}/{name}"))  # noqa: B023
    (tmp_path / "file").write_text("x")
    refused(lambda: state.save(tmp_path / "file" / "x"), unchanged=lambda: files_below(tmp_path))
    refused(lambda: state.save(tmp_path), unchanged=lambda: files_below(tmp_path))
    long = tmp_path / ("ñ" * 127)
    state.save(long)
    assert state_bits(manager.load(long)) == state_bits(state)
