"""Coded pairs on every backend against the float64 reference: the same codes, sets and outputs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import less_cache as lc
from less_cache.arrays import EMPTY
from less_cache.quantization import codes
from less_cache.quantization.transforms import layer_transforms
from tests.conformance.cases import CODED_CASES, ORACLE, Runner, each_case
from tests.conformance.scenarios import CloseCall, Scenario
from tests.helpers import as_numpy, assert_close, assert_close_sums, assert_same_state
from tests.quantization.fitted import fitted

POLICIES = {2: lc.H2O(), 3: lc.Scissorhands(window=5), 4: lc.DecayedH2O(factor=0.9), 8: lc.TOVA()}
EDGE = 2e-3
"""How near to a level's edge, in levels, a number must be for its code to be a tie."""


def coded_scenario(case, bits, kind, **changes):
    """Ragged heads, padding full of NaN, a prompt, steps and a later turn."""
    config = lc.CacheConfig(
        num_layers=1,
        query_heads=4,
        kv_heads=2,
        head_dim=16 if kind == "hadamard" else 12,
        capacity=[[5, 8]],
        policy=POLICIES[bits],
        rank=2,
        dtype=case.dtype,
        quantization=lc.Quantization(bits, bits, kind),
    ).replace(**changes)
    chunks = ((7, "left"), (1, "none"), (1, "rows"), (4, "holes"), (1, "none"))
    return Scenario(config, "exp", batch=2, chunks=chunks, seed=bits)


@pytest.fixture(autouse=True)
def _uncompiled():
    """What Inductor compiles for some tens of seconds runs as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


@each_case(lambda case: case.wide, CODED_CASES)
@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_sets_and_outputs_are_the_oracles(case, bits, kind):
    scenario = coded_scenario(case, bits, kind)
    assert follow(case, scenario) >= 3


@each_case(lambda case: not case.wide)
@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
def test_sixteen_bit_outputs_are_within_their_bound(case, kind):
    # A window evicts by position, so no set can differ.
    scenario = coded_scenario(case, 4, kind, policy=lc.SinkWindow(1))
    assert follow(case, scenario) >= 2


@each_case(lambda case: case.wide)
def test_layers_of_other_bits_and_ranks_are_each_what_they_are_alone(case):
    config = coded_scenario(case, 4, "hadamard").config.replace(
        num_layers=3,
        capacity=[5, [5, 8], 7],
        policy=[lc.H2O(), lc.SinkWindow(sinks=1), lc.DecayedH2O(factor=0.9)],
        rank=[2, 0, 3],
        quantization=[None, lc.Quantization(3, 3), lc.Quantization(4, 4, "calibrated")],
    )
    chunks = ((7, "left"), (1, "none"), (3, "holes"))
    assert follow(case, Scenario(config, "exp", batch=2, chunks=chunks, seed=3)) >= 2


def follow(case, scenario) -> int:
    """Compare after each call; how many calls went by before a tie fell to another side."""
    maps, config = scenario.maps(case), scenario.config
    calibrated = any(codes and codes.transform == "calibrated" for codes in config.quantizations)
    transforms = fitted(config) if calibrated else None
    runner = Runner(case, config, maps, scenario.batch, transforms)
    wide = config.replace(dtype="float64", state_dtype=None)
    oracle = Runner(ORACLE, wide, maps, scenario.batch, transforms)
    seen = [Seen(config, layer, scenario.batch, transforms) for layer in range(config.num_layers)]
    close = CloseCall()
    for number, (layer, (q, k, v), mask) in enumerate(scenario.appends(case)):
        calls = number // config.num_layers
        seen[layer].add(k, v, mask)
        with close.watch():
            expected = oracle.attend(q, k, v, mask, layer=layer)
        if close.met and not case.exact:
            return calls
        found = runner.attend(q, k, v, mask, layer=layer)
        assert_close(found, expected, case.outputs, "out")
        held, wanted = runner.held(layer), oracle.held(layer)
        if config.layer(layer).quantization is None:
            assert_same_state(held, wanted, case.state)
        elif same_codes(layer, runner, oracle, seen[layer]):
            return calls
        assert_close_sums(held, wanted, case.state)
    return len(scenario.chunks)


@dataclasses.dataclass
class Seen:
    """Every pair in the inner basis, float64, by its position."""

    def __init__(self, config, layer, batch, transforms):
        self.layer = config.layer(layer)
        basis = layer_transforms(self.layer, None if transforms is None else transforms[layer])
        self.basis = basis and basis.to(dtype=torch.float64)
        self.rows = [[] for _ in range(batch)]

    def add(self, k, v, mask):
        if self.basis is None:
            return
        keys = self.basis.enter_keys(torch.from_numpy(k)).numpy()
        values = self.basis.enter_values(torch.from_numpy(v)).numpy()
        for row, pairs in enumerate(self.rows):
            for token in range(k.shape[2]):
                if mask is None or mask[row, token]:
                    pairs.append((keys[row, :, token], values[row, :, token]))


def same_codes(index, runner, oracle, seen) -> bool:
    """Whether some codes differ, which all must be ties; sets are equal in any case."""
    layer = seen.layer
    found, wanted = (
        {n: as_numpy(a) for n, a in side.state.layers[index].arrays().items()}
        for side in (runner, oracle)
    )
    tied = False
    for row, head in np.ndindex(len(seen.rows), layer.kv_heads):
        slots = layer.head_slots(head)
        orders = [np.argsort(side["positions"][row, slots]) for side in (found, wanted)]
        positions = wanted["positions"][row, slots][orders[1]]
        np.testing.assert_array_equal(found["positions"][row, slots][orders[0]], positions)
        for number, (name, layout) in enumerate(
            [("key", layer.key_layout), ("value", layer.value_layout)]
        ):
            for a, b, position in zip(*orders, positions, strict=True):
                if position == EMPTY:
                    continue
                pair = [
                    (side[f"{name}s"][row, slots][i], side[f"{name}_scales"][row, slots][i])
                    for side, i in ((found, a), (wanted, b))
                ]
                exact = seen.rows[row][position][number][head]
                tied |= differs(layout, pair, exact)
    return tied


def differs(layout, pair, exact) -> bool:
    """Whether two codings of a number differ; then it lies at the edge of two levels."""
    (bytes_a, scale_a), (bytes_b, scale_b) = pair
    spacing = np.spacing(np.float16(scale_b)).astype(np.float64)
    assert abs(scale_a - scale_b) <= spacing, (scale_a, scale_b)
    a, b = (codes.unpack(layout, x.astype(np.uint8)).astype(int) for x in (bytes_a, bytes_b))
    if np.array_equal(a, b) and scale_a == scale_b:
        return False
    stored = layout.stored
    exact = exact[:stored] / scale_b + layout.centers[:stored]
    reach = EDGE + spacing / scale_b * np.abs(exact - layout.centers[:stored])
    far = np.abs(exact - (np.floor(exact) + 0.5)) > reach
    assert (np.abs(a - b) <= 1).all()
    assert not (far & (a != b)).any(), (a, b, exact)
    return True
