"""The operators' bodies over codes do what the float64 reference and the torch backend do."""

import numpy as np
import pytest
import torch

import less_cache as lc
import less_cache.arrays
from exporters.onnx import parts
from less_cache.arrays import array_shapes
from tests.exporters.onnx.single_layer import OnnxLayers
from tests.helpers import POLICIES, held_by, policy_id, random_maps
from tests.policies import Oldest
from tests.quantization.fitted import coded_config, fitted, some_tokens

CHUNKS = (9, *(1,) * 7, 6, 1, 1)


class Sides:
    """One cache three times: ONNX Runtime's, and two managers'."""

    def __init__(self, config, seed=0):
        calibrated = config.quantization.transform == "calibrated"
        transforms = fitted(config, seed) if calibrated else None
        maps = random_maps(config, "exp" if seed % 2 else "paper")
        self.config = config
        self.onnx = OnnxLayers(config, maps, 2, transforms)
        self.managers = [
            lc.CacheManager(config, maps, backend=backend, transforms=transforms)
            for backend in ("reference", "torch")
        ]
        dtypes = (np.float64, getattr(torch, config.dtype))
        self.states = [m.init(2, dtype=d) for m, d in zip(self.managers, dtypes, strict=True)]

    def attend(self, tokens, mask):
        """The outputs: ONNX Runtime's, the reference's, torch's."""
        arrays = [x.numpy() for x in tokens]
        reference, fast = self.managers
        dtype = getattr(torch, self.config.dtype)
        return (
            self.onnx.attend(*arrays, mask.numpy()),
            reference.attend(self.states[0], 0, *arrays, mask.numpy()),
            fast.attend(self.states[1], 0, *(x.to(dtype) for x in tokens), mask).double().numpy(),
        )

    def compare(self, bound=1e-4):
        """Kept sets equal, codes but for ties, sums within `bound`."""
        found = self.onnx.held()
        for state in self.states:
            wanted = held_by(state.layers[0], self.config.layer(0))
            np.testing.assert_array_equal(found.positions, wanted.positions)
            for name in ("keys", "values"):
                assert (getattr(found, name) != getattr(wanted, name)).mean() < 0.02, name
            assert (found.scores is None) == (wanted.scores is None)
            if wanted.scores is not None:
                np.testing.assert_allclose(found.scores, wanted.scores, atol=bound, rtol=bound)
            for name in ("H", "z"):
                # A tie among what has left shows in few numbers.
                error = np.abs(getattr(found, name) - getattr(wanted, name))
                size = 1 + np.abs(getattr(wanted, name))
                assert not error.size or np.quantile(error / size, 0.9) < bound, name

    def settle(self):
        """Give all what the reference holds, each in its own slots, so that ties do not add up."""
        layer, source = self.config.layer(0), self.states[0].layers[0]
        for state in (self.onnx.states[0], self.states[1].layers[0]):
            own = {name: np.asarray(array) for name, array in state.named().items()}
            places = own["positions"], source.positions
            for name in ("H", "z"):
                own[name][...] = getattr(source, name)
            for row in range(2):
                for head in range(layer.kv_heads):
                    slots = layer.head_slots(head)
                    to, fro = (x[row, slots].argsort() for x in places)
                    for name in own.keys() - {"H", "z", "positions"}:
                        own[name][row, slots][to] = getattr(source, name)[row, slots][fro]


def assert_close(found, wanted, bound):
    np.testing.assert_allclose(found, wanted, atol=bound, rtol=bound)


def follow(config, chunks=CHUNKS, seed=0, bound=5e-5):
    sides = Sides(config, seed)
    for index, size in enumerate(chunks):
        tokens = some_tokens(config, 2, size, seed=20 * seed + index)
        tokens = [x.to(getattr(torch, config.dtype)).double() for x in tokens]
        draw = torch.Generator().manual_seed(index)
        mask = torch.rand(2, size, generator=draw) < 0.8
        found, *wanted = sides.attend(tokens, mask)
        for out in wanted:
            assert_close(found, out, bound)
        assert not found[~mask.numpy()[:, None].repeat(4, 1)].any()
        sides.compare()
        sides.settle()


@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (8, 8), (4, 2)])
def test_every_width_and_both_transforms(bits, kind):
    follow(coded_config(lc.H2O(), bits, kind, dtype="float32"), seed=sum(bits))


@pytest.mark.parametrize(
    "policy", [*(p for p in POLICIES if p != lc.H2O()), Oldest()], ids=policy_id
)
def test_every_policy(policy):
    kind = "hadamard" if isinstance(policy, lc.KeyNorm) else "calibrated"
    follow(coded_config(policy, (3, 4), kind, dtype="float32"))


@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
def test_rank_0_and_a_head_size_that_fills_no_byte(kind):
    config = coded_config(lc.TOVA(), (3, 2), kind, rank=0, head_dim=12, dtype="float32")
    follow(config)


def test_a_soft_cap():
    follow(coded_config(lc.H2O(), (4, 4), "hadamard", softcap=5.0, dtype="float32"))


def test_positions_keep_the_dtype_that_they_are_stored_in(monkeypatch):
    def narrow(layer):
        shapes = array_shapes(layer)
        return {**shapes, "positions": (shapes["positions"][0], "int16")}

    for module in (less_cache.arrays, parts):
        monkeypatch.setattr(module, "array_shapes", narrow)
    config = coded_config(lc.H2O(), (4, 4), "hadamard", dtype="float32")
    layers = OnnxLayers(config, random_maps(config), 2)
    for size in (9, 1, 1, 6, 1):
        layers.attend(*(x.numpy() for x in some_tokens(config, 2, size)))
    assert layers.states[0].positions.dtype == np.int16
    # Every head of 7 and 11 slots is full, of tokens among the 18 seen.
    assert layers.states[0].positions.min() >= 0
    assert (layers.states[0].positions.max(1) == 17).all()
