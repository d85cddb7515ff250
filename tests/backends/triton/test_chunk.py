"""Several tokens at once: kernels against the float64 reference, and what they keep in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import less_cache as lc
from less_cache.backends import triton as backend
from less_cache.backends.triton import chunk, launch
from less_cache.backends.triton.launch import recording
from tests.backends.triton.guards import Guards
from tests.backends.triton.oracle import DEVICE, Pair, config

# Tiles of float32 are 32 by 32: these sizes need several of them, the last ones partly filled.
CASES = {
    "several tiles": (config(capacity=37), "paper", (70, 1, 45), False),
    "padding": (config(kv_heads=1, group=2, head_dim=20, rank=5), "paper", (40, 33), True),
    "decay": (config(policy=lc.DecayedH2O(factor=0.9), softcap=3.0), "paper", (35, 9), True),
    "last query": (config(policy=lc.TOVA(), rank=0), "exp", (34, 5), False),
    "history": (config(policy=lc.Scissorhands(window=4)), "exp", (33, 2, 9), True),
    "capacity by head": (
        config(kv_heads=4, capacity=[[3, 9, 9, 40]], policy=lc.H2O(), group=2),
        "paper",
        (35, 9, 3),
        True,
    ),
    "observation window": (
        config(policy=lc.ObservationWindow(window=3, neighbours=3)),
        "exp",
        (33, 2, 9),
        True,
    ),
    "window": (config(policy=lc.SinkWindow(sinks=1), group=3), "paper", (40, 8), False),
    "full": (config(policy=lc.FullCache(), capacity=50, rank=0), "exp", (33, 17), False),
}


@pytest.mark.parametrize("name", CASES)
def test_chunks_are_the_references_and_stay_in_their_buffers(name, monkeypatch):
    cache, kind, chunks, masked = CASES[name]
    pair = Pair(cache, batch=2, kind=kind)
    guards = Guards()
    pair.arrays = guards.arrays(pair.arrays)
    monkeypatch.setattr(torch, "empty", guards.empty)
    for tokens in chunks:
        arrays = [guards.copy(array) for array in pair.inputs(tokens)]
        pair.check(arrays, pair.mask(tokens) if masked else None)
    guards.check()


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-2), ("bfloat16", 2e-1)])
def test_sixteen_bits(dtype, bound):
    cache = config(policy=lc.SinkWindow(sinks=1), dtype=dtype, group=2, kv_heads=1, capacity=20)
    # The other kind's features reach 10**5 here, whose sum sixteen bits round by more.
    pair = Pair(cache, batch=1, kind="paper")
    for tokens in (130, 70):
        pair.check(pair.inputs(tokens), bound=bound)


class Largest(TorchDispatchMode):
    """The size of the largest tensor made inside."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("policy", [lc.H2O(), lc.Scissorhands(window=8)], ids=str)
def test_no_matrix_of_tokens_by_tokens_is_ever_made(policy):
    tokens = 1024
    pair = Pair(config(kv_heads=1, policy=policy), batch=1)
    arrays = pair.inputs(tokens)
    with recording() as recorded, Largest() as largest:
        backend.attend(pair.layer, pair.arrays, pair.maps, *arrays, lengths=pair.lengths)
    assert recorded[0].kernel is chunk.attend_chunk
    linear = max(pair.layer.head_dim, pair.maps.hidden) * (tokens + pair.layer.capacity)
    assert 0 < largest.size <= linear < tokens * tokens / 8


def test_tensors_that_no_kernel_reaches_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    if DEVICE == "cuda":
        pytest.skip("a CUDA GPU is here")
    pair = Pair(config(), batch=1)
    with pytest.raises(ValueError, match=r"device: .*'cpu'.*CUDA"):
        backend.attend(pair.layer, pair.arrays, pair.maps, *pair.inputs(1), lengths=pair.lengths)
