"""Which configs the backend takes, and when "auto" takes the backend."""

import pytest
import torch

import less_cache as lc
from less_cache.backends import best_backend, triton
from tests.backends.triton.oracle import config


class Mine(lc.Policy):
    """A user's own policy, which only the reference runs."""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "triton"),
        ({"dtype": "bfloat16", "head_dim": 256, "capacity": 8192}, "triton"),
        ({"dtype": "float64"}, "torch"),
        ({"head_dim": 257}, "torch"),
        ({"rank": 0, "policy": Mine()}, "reference"),
    ],
)
def test_auto_takes_triton_on_a_gpu_where_it_can(changes, expected):
    assert best_backend(config(**{"rank": 0, **changes}), "cuda") == expected


def test_auto_keeps_torch_on_the_cpu():
    assert best_backend(config(rank=0), "cpu") == "torch"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 320}, "head_dim: got 320, but backend 'triton' takes at most 256"),
        ({"rank": 65}, "rank: got 65, but backend 'triton' takes at most 64"),
        ({"dtype": "float64"}, "dtype: got 'float64'"),
        ({"policy": Mine()}, "policy: layer 0 has Mine.*whose scores are Python code"),
    ],
)
def test_what_no_kernel_was_made_for_is_refused(changes, message):
    cache = config(**{"rank": 0, **changes})
    with pytest.raises(ValueError, match=message):
        triton.check_config(cache)


def test_a_state_of_a_dtype_without_kernels_is_refused():
    with pytest.raises(ValueError, match="dtype: got 'float64'"):
        lc.CacheManager(config(rank=0), backend="triton").init(1, dtype=torch.float64)
