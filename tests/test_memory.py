"""What a cache costs: the bytes it says, nothing besides, and no [S, S] matrix on the way."""

import gc
import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import less_cache as lc
from tests.helpers import POLICIES, policy_id, random_maps, small_config, torch_inputs

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_takes_the_bytes_the_config_says(policy, dtype):
    for kv_heads, head_dim, rank, batch, capacity in itertools.product(
        (1, 4), (4, 64), (0, 3), (1, 5), ([9, 9], [7, 30])
    ):
        config = small_config(
            policy=policy, kv_heads=kv_heads, head_dim=head_dim, rank=rank, capacity=capacity
        )
        manager = lc.CacheManager(config, random_maps(config))
        state = manager.init(batch, dtype=dtype, device="meta")
        assert state.nbytes == batch * config.bytes_per_sequence(dtype)
        assert state.nbytes == batch * config.with_dtype(dtype).bytes_per_sequence()


@pytest.mark.parametrize("state_dtype", ["float32", "float64"])
def test_the_states_dtype_counts(state_dtype):
    config = small_config(state_dtype=state_dtype)
    state = lc.CacheManager(config, random_maps(config)).init(2)
    assert state.nbytes == 2 * config.bytes_per_sequence()


def test_a_numpy_state_takes_the_same_bytes():
    config = small_config(policy=lc.Scissorhands())
    manager = lc.CacheManager(config, random_maps(config), backend="reference")
    for dtype in (np.float64, np.float32, np.float16):
        assert manager.init(3, dtype=dtype).nbytes == 3 * config.bytes_per_sequence(dtype)


def test_the_size_is_the_same_after_any_number_of_tokens():
    config = small_config(policy=lc.Scissorhands())
    manager = lc.CacheManager(config, random_maps(config))
    state = manager.init(2)
    arrays = [layer.arrays() for layer in state.layers]
    for tokens in (1, 100, 1, 37, 1):
        for layer in range(2):
            manager.attend(state, layer, *torch_inputs(config, 2, tokens))
        assert state.nbytes == 2 * config.bytes_per_sequence()
        for old, layer in zip(arrays, state.layers, strict=True):
            assert all(layer.arrays()[name] is array for name, array in old.items())


def living_bytes():
    """Bytes of the distinct storages of all tensors that anything still refers to."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # Other tests leave sparse tensors behind, which have no storage.
        plain = type(thing) is torch.Tensor and thing.layout is torch.strided
        if plain and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("policy", POLICIES[1:], ids=policy_id)
def test_after_a_long_prompt_nothing_but_the_state_is_alive(backend, policy):
    config = small_config(policy=policy, num_layers=1)
    manager = lc.CacheManager(config, random_maps(config), backend=backend)
    tokens = 60 if backend == "reference" else 3000
    manager.attend(manager.init(1), 0, *torch_inputs(config, 1, 9))
    before = living_bytes()
    state = manager.init(1)
    manager.attend(state, 0, *torch_inputs(config, 1, tokens))
    manager.attend(state, 0, *torch_inputs(config, 1, 1))
    assert living_bytes() - before == state.nbytes
    for array in state.layers[0].arrays().values():
        assert array.untyped_storage().nbytes() == array.nbytes


PROMPT_OF_16K = """
    import json, resource, sys
    import torch
    import less_cache as lc

    torch.set_num_threads(1)
    config = lc.CacheConfig(1, 8, 8, 64, 512, lc.H2O(), rank=8)
    manager = lc.CacheManager(config, lc.FeatureMaps.initialise(config, hidden=32), backend="torch")
    state = manager.init(1)
    warm = [torch.zeros(1, 8, 600, 64) for _ in range(3)]
    manager.attend(state, 0, *warm)
    state.reset()
    q, k, v = (torch.rand(1, 8, 16 * 1024, 64) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = manager.attend(state, 0, q, k, v)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({
        "bytes": (peak - before) * unit,
        "finite": bool(out.isfinite().all()),
        "length": int(state.length[0]),
        "state": state.nbytes,
    }))
"""


def test_a_prompt_of_16k_tokens_takes_less_than_half_a_gigabyte():
    pytest.importorskip("resource")
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROMPT_OF_16K)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout)
    assert measured["finite"]
    assert measured["length"] == 16 * 1024
    # The scores of all queries by all keys would be 8.6 GB.
    assert measured["bytes"] < 2**29
    assert measured["state"] < 3 * 2**20
