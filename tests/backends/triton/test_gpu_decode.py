"""The GPU benchmark's model and counts, on small shapes without a GPU."""

import pytest
import torch

from benchmarks import gpu_decode, gpu_predictions
from tests.backends.triton.oracle import DEVICE

TINY = gpu_predictions.Shape("tiny", 2, 32, 4, 2, 16, 48, 50)


@pytest.mark.parametrize("rank", [None, 0, 2])
def test_each_contestant_takes_a_step_and_a_prompt(rank):
    if rank is None:
        cache = gpu_decode.Full(TINY, 2, 9, DEVICE, torch.float32)
    else:
        cache = gpu_decode.Less(TINY, 2, 6, rank, DEVICE, torch.float32, hidden=8)
    decoder = gpu_decode.Decoder(TINY, DEVICE, torch.float32)
    assert decoder.forward(torch.randn(2, 3, 32, device=DEVICE), cache).shape == (2, 50)
    if rank is not None:
        cache.fill()
    step = decoder.forward(torch.randn(2, 1, 32, device=DEVICE), cache)
    assert step.shape == (2, 50)
    assert bool(step.isfinite().all())


def test_counts_grow_as_the_caches_do():
    shape = gpu_predictions.SHAPES["llama-2-7b"]
    assert shape.weights == pytest.approx(6.6e9, rel=0.02)
    full = gpu_predictions.count_full(shape, 2, 4096)
    assert full.bytes == 2 * 32 * 32 * 4096 * 128 * 2 * 2
    sparse, less = (gpu_predictions.count_less(shape, 64, 205, rank) for rank in (0, 8))
    assert 1.0 < less.bytes / sparse.bytes < 1.2
    assert sparse.bytes < gpu_predictions.count_full(shape, 64, 4096).bytes / 15


@pytest.mark.skipif(DEVICE == "cuda", reason="a CUDA GPU is here")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_decode.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
