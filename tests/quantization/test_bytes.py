"""What a slot takes, to the byte: the figures of docs/quantization.md."""

import pytest

import less_cache as lc
from less_cache.arrays import empty_arrays

LONG = 2**15 + 1


@pytest.mark.parametrize(
    ("policy", "bits", "changes", "nbytes"),
    [
        (lc.H2O(), 8, {}, 138),
        (lc.H2O(), 3, {}, 58),
        (lc.H2O(), 3, {"head_dim": 128}, 106),
        (lc.H2O(), 3, {"max_positions": LONG}, 60),
        (lc.H2O(), 3, {"max_positions": None}, 60),
        (lc.Scissorhands(), 3, {}, 66),
        (lc.KeyNorm(), 3, {}, 58),
        (lc.SinkWindow(), 3, {}, 54),
        (lc.FullCache(), 3, {}, 54),
        (lc.SinkWindow(), 2, {"max_positions": LONG}, 40),
        (lc.SinkWindow(), None, {}, 264),
        (lc.FullCache(), None, {}, 264),
    ],
)
def test_a_slot_takes_what_its_arrays_do(policy, bits, changes, nbytes):
    codes = None if bits is None else lc.Quantization(bits, bits)
    given = {"head_dim": 64, "max_positions": 2**15, "dtype": "float16", **changes}
    config = lc.CacheConfig(1, 2, 2, capacity=8, policy=policy, rank=0, quantization=codes, **given)
    layer = config.layer(0)
    assert layer.slot_bytes == nbytes
    arrays = empty_arrays(layer, 1)
    assert sum(array.nbytes for array in arrays.named().values()) == layer.slots * nbytes
    told = isinstance(policy, lc.SinkWindow | lc.FullCache)
    assert (arrays.scores is None) == (told and codes is not None)
