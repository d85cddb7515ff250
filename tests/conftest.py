"""What all tests share: the same examples in every run, and one thread of arithmetic."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.interpreter import hasten

# Where there is no GPU, Triton's kernels run under its interpreter: it reads this when imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    hasten()

settings.register_profile(
    "less_cache",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("less_cache")

# Small shapes: a team of threads costs more than it gives.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cluster():
    """A cluster of Ray with two workers on this machine."""
    pytest.importorskip("psutil")
    ray = pytest.importorskip("ray", reason="needs Ray: make vllm sets up an environment with it")
    from less_cache.distributed import Ray

    ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield Ray()
    ray.shutdown()
