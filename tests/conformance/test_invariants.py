"""What must hold of every cache at any time, told from the state alone and not from an oracle."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

import less_cache as lc
from less_cache.backends import reference
from tests.conformance.cases import ORACLE, Runner, each_case
from tests.conformance.scenarios import scenarios
from tests.helpers import Held, assert_close, policy_id, random_inputs, random_maps


class Ledger:
    """Every token that one layer has seen, row by row."""

    def __init__(self, batch: int) -> None:
        self.keys = [[] for _ in range(batch)]
        self.values = [[] for _ in range(batch)]

    def add(self, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> None:
        for row in range(len(self.keys)):
            for token in range(k.shape[2]):
                if mask is None or mask[row, token]:
                    self.keys[row].append(k[row, :, token])
                    self.values[row].append(v[row, :, token])


def check_layer(
    held: Held,
    ledger: Ledger,
    layer: lc.config.LayerConfig,
    maps: lc.layer_maps.LayerMaps | None,
    bound: float,
) -> None:
    """Every token seen is in exactly one place: a slot, or the low-rank state."""
    for row, (keys, values) in enumerate(zip(ledger.keys, ledger.values, strict=True)):
        seen = len(keys)
        assert held.length[row] == seen
        for head in range(layer.kv_heads):
            positions = held.positions[row, head]
            kept = positions[positions >= 0]
            capacity = layer.capacities[head]
            assert len(kept) == min(seen, capacity)
            assert len(set(kept)) == len(kept)
            assert set(kept) <= set(range(seen))
            if layer.policy.evicts:
                policy = layer.policies[head]
                protected = {*range(policy.sinks), *range(seen - policy.recent, seen)}
                assert protected & set(range(seen)) <= set(kept)
            for slot, position in enumerate(positions):
                if position >= 0:
                    np.testing.assert_array_equal(held.keys[row, head, slot], keys[position][head])
                    np.testing.assert_array_equal(
                        held.values[row, head, slot], values[position][head]
                    )
            if maps is None:
                assert held.H.shape[2] == 0
                continue
            gone = sorted(set(range(seen)) - set(kept))
            z, H = np.zeros(layer.rank), np.zeros((layer.rank, layer.head_dim))
            weights = {name: np.asarray(t.double()[head]) for name, t in maps.tensors.items()}
            for position in gone:
                features = reference.psi(
                    np, {"kind": maps.kind, **weights}, keys[position][head][None]
                )[0]
                z += features
                H += np.outer(features, values[position][head])
            assert_close(held.z[row, head], z, bound, "z")
            assert_close(held.H[row, head], H, bound, "H")


@each_case()
def test_every_token_seen_is_in_one_slot_or_in_the_state(case):
    @settings(max_examples=case.examples)
    @given(scenarios(case))
    def check(scenario):
        maps = scenario.maps(case)
        runner = Runner(case, scenario.config, maps, scenario.batch)
        ledgers = [Ledger(scenario.batch) for _ in range(scenario.config.num_layers)]
        for layer, (q, k, v), mask in scenario.appends(case):
            out = runner.attend(q, k, v, mask, layer=layer)
            assert np.isfinite(out).all()
            if mask is not None:
                assert (out[~np.broadcast_to(mask[:, None], out.shape[:3])] == 0).all()
            ledgers[layer].add(k, v, mask)
            check_layer(
                runner.held(layer),
                ledgers[layer],
                scenario.config.layer(layer),
                maps and maps[layer],
                case.state,
            )
        assert runner.state.nbytes == scenario.batch * scenario.config.bytes_per_sequence()

    check()


@dataclasses.dataclass(frozen=True)
class ByHash(lc.Policy):
    """A user's own policy: pairs leave in an order that a hash of their position gives."""

    sinks: int = 1
    recent: int | None = 2

    def initial_scores(self, xp, keys, positions):
        return xp.astype((positions * 7919 + 345) % 1009, keys.dtype)

    def update(self, xp, scores, history, probabilities, visible):
        return scores, history


@dataclasses.dataclass(frozen=True)
class Loudest(lc.Policy):
    """A user's own vectorised policy: the largest probability that a pair ever had."""

    vectorised = True

    def update(self, xp, scores, history, probabilities, visible):
        return xp.maximum(scores, xp.max(probabilities, axis=(-3, -2))), history


@dataclasses.dataclass(frozen=True)
class HashAtOnce(ByHash):
    """`ByHash` for any number of axes."""

    vectorised = True


@each_case(lambda case: case.custom_policies)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_users_own_policy_obeys_the_invariants(case, rank):
    own_policy_run(case, ByHash(), rank)


@each_case(lambda case: case.vectorised_policies)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("policy", [Loudest(recent=2), HashAtOnce()], ids=policy_id)
def test_a_users_vectorised_policy_obeys_the_invariants(case, rank, policy):
    own_policy_run(case, policy, rank)


def own_policy_run(case, policy, rank):
    config = lc.CacheConfig(1, 4, 2, 4, [[6, 9]], policy, rank=rank, dtype=case.dtype)
    maps = case.rounded_maps(random_maps(config))
    runner, ledger = Runner(case, config, maps, 2), Ledger(2)
    oracle = Runner(ORACLE, config, maps, 2)
    rng = np.random.default_rng(0)
    for tokens in (4, 1, 1, 1, 5, 1, 9, 1, 1):
        q, k, v = (case.rounded(array) for array in random_inputs(config, 2, tokens, rng))
        mask = rng.random((2, tokens)) < 0.8
        out = runner.attend(q, k, v, mask)
        assert_close(out, oracle.attend(q, k, v, mask), case.outputs, "out")
        ledger.add(k, v, mask)
        check_layer(runner.held(), ledger, config.layer(0), maps and maps[0], case.state)
    np.testing.assert_array_equal(runner.held().positions, oracle.held().positions)
    # The policy decided, not age: beyond what is protected, old and new pairs are mixed.
    seen = len(ledger.keys[0])
    free = [p for p in runner.held().positions[0, 0] if 1 <= p < seen - 2]
    assert free != list(range(seen - 2 - len(free), seen - 2))


@each_case(lambda case: not case.custom_policies)
def test_a_users_own_policy_is_refused_where_only_tables_are_understood(case):
    config = lc.CacheConfig(1, 4, 2, 4, 6, ByHash(), rank=0, dtype=case.dtype)
    with pytest.raises(ValueError, match=r"policy: .*ByHash.*'reference'"):
        lc.CacheManager(config, backend=case.backend)
    assert lc.CacheManager(config).backend_on("cpu") == "reference"
