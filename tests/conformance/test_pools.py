"""The step over arrays that somebody else owns: rows of a pool, pages, packed sequences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import less_cache as lc
from tests.conformance.cases import CASES, ORACLE, BackendCase, Runner, each_case, marks_of
from tests.conformance.scenarios import CloseCall
from tests.helpers import (
    POLICIES,
    assert_close,
    assert_same_state,
    held_by,
    policy_id,
    random_inputs,
    random_maps,
)

ROWS = 7
CAPACITIES = ([5, 5], [4, 9], [40, 4])
POOLED = [policy for policy in POLICIES if policy.evicts]


def config_for(case: BackendCase, policy: lc.Policy, capacities: list[int], rank: int):
    return lc.CacheConfig(
        num_layers=1,
        query_heads=2 * min(2, case.max_group),
        kv_heads=2,
        head_dim=case.head_dims[0],
        capacity=[capacities],
        policy=policy,
        rank=min(rank, case.max_rank),
        dtype=case.dtype,
    )


class Pool:
    """A pool full of NaN and nonsense, of which an engine uses some rows, in pages of its own."""

    def __init__(self, case: BackendCase, config: lc.CacheConfig, maps: lc.FeatureMaps | None):
        self.case, self.config = case, config
        layer = config.layer(0)
        if case.numpy:
            self.arrays = lc.empty_arrays(layer, ROWS, numpy=True)
        else:
            page = config.page(0)
            buffer = torch.zeros(ROWS, page.nbytes + 48, dtype=torch.int8, device=case.device)
            self.arrays = page.arrays(buffer)
        for array in self.arrays.named().values():
            floating = array.dtype.kind == "f" if case.numpy else array.is_floating_point()
            array[...] = float("nan") if floating else 3
        self.plan = lc.plan_step(
            layer,
            maps and maps[0],
            device="numpy" if case.numpy else case.device,
            backend=case.backend,
        )
        self.lengths = np.zeros(ROWS, dtype=np.int32)

    def step(self, rows: list[int], q, k, v, mask=None, *, counts=None) -> np.ndarray:
        numbers = np.asarray(rows, dtype=np.int64)
        given = [self.case.array(array) for array in (q, k, v)]
        lengths = self.array(self.lengths[numbers])
        extra = {}
        if counts is not None:
            starts = np.cumsum([0, *counts]).astype(np.int32)
            extra = {"query_start_loc": self.array(starts), "max_query_len": max(counts)}
        elif mask is not None:
            extra = {"mask": self.array(mask)}
        before = lengths.copy() if self.case.numpy else lengths.clone()
        out = lc.step(
            self.plan, self.arrays, *given, lengths=lengths, rows=self.array(numbers), **extra
        )
        assert (before == lengths).all()
        return out if self.case.numpy else out.double().cpu().numpy()

    def array(self, array: np.ndarray):
        return array if self.case.numpy else torch.as_tensor(array, device=self.case.device)

    def held(self, rows: list[int]):
        picked = {n: array[rows] for n, array in self.arrays.named().items()}
        length = self.array(self.lengths[rows])
        return held_by(lc.LayerState(**picked, length=length), self.config.layer(0))


def each_pool(test):
    """Every case with every policy and all capacities; interpreted kernels take these in turn."""
    cases = [case for case in CASES if case.wide]
    return pytest.mark.parametrize(
        ("case", "policy", "capacities"),
        [
            pytest.param(
                case,
                policy,
                capacities,
                marks=marks_of(case),
                id=f"{case.name}-{policy_id(policy)}-{capacities}",
            )
            for case in cases
            for number, policy in enumerate(POOLED)
            for place, capacities in enumerate(CAPACITIES)
            if not case.interpreted or place == number % len(CAPACITIES)
        ],
    )(test)


@each_pool
def test_rows_of_a_pool_full_of_nan_follow_the_oracle(case, policy, capacities):
    config = config_for(case, policy, capacities, rank=2)
    maps = random_maps(config)
    pool, oracle = Pool(case, config, maps), Runner(ORACLE, config, maps, 3)
    rows = [5, 0, 2]
    rng = np.random.default_rng(1)
    close = CloseCall()
    for tokens in (1, 6, 1, 1, 1, 4, 1, 1):
        q, k, v = (case.rounded(array) for array in random_inputs(config, 3, tokens, rng))
        mask = rng.random((3, tokens)) < 0.7
        with close.watch():
            expected = oracle.attend(q, k, v, mask)
        if close.met and not case.exact:
            return
        assert_close(pool.step(rows, q, k, v, mask), expected, case.outputs, "out")
        pool.lengths[rows] += mask.sum(1).astype(np.int32)
        used = pool.lengths[rows] > 0
        assert_same_rows(pool.held(rows), oracle.held(), used, case.state)


def assert_same_rows(actual, expected, used: np.ndarray, bound: float) -> None:
    """Compare the rows that have seen something; the others may hold anything."""
    for held in (actual, expected):
        for name, array in vars(held).items():
            if array is not None:
                setattr(held, name, array[used])
    assert_same_state(actual, expected, bound)


@each_pool
def test_packed_sequences_of_any_length_follow_the_oracle(case, policy, capacities):
    config = config_for(case, policy, capacities, rank=2)
    maps = random_maps(config)
    pool = Pool(case, config, maps)
    oracles = {row: Runner(ORACLE, config, maps, 1) for row in range(ROWS)}
    rng = np.random.default_rng(2)
    close = CloseCall()
    for _ in range(6):
        rows = [int(row) for row in rng.permutation(ROWS)[: rng.integers(1, 5)]]
        counts = [int(count) for count in rng.choice([0, 1, 1, 1, 2, 9], len(rows))]
        if not sum(counts):
            continue
        q, k, v = (case.rounded(x[0]) for x in random_inputs(config, 1, sum(counts), rng))
        starts = np.cumsum([0, *counts])
        expected = np.zeros((sum(counts), *q.shape[:1], q.shape[2]))
        for row, start, stop in zip(rows, starts, starts[1:], strict=False):
            if stop > start:
                with close.watch():
                    own = oracles[row].attend(*(x[None, :, start:stop] for x in (q, k, v)))
                expected[start:stop] = own[0].swapaxes(0, 1)
        if close.met and not case.exact:
            return
        out = pool.step(rows, *(x.swapaxes(0, 1) for x in (q, k, v)), counts=counts)
        assert_close(out, expected, case.outputs, "out")
        pool.lengths[rows] += np.asarray(counts, dtype=np.int32)
        for row in rows:
            if pool.lengths[row]:
                assert_same_state(pool.held([row]), oracles[row].held(), case.state)


@each_case(lambda case: case.wide)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("capacities", CAPACITIES, ids=str)
def test_a_spare_row_named_many_times_harms_nobody(case, tokens, capacities):
    config = config_for(case, lc.H2O(recent=1), capacities, rank=2)
    maps = random_maps(config)
    pool, alone = Pool(case, config, maps), Pool(case, config, maps)
    rng = np.random.default_rng(3)
    for _ in range(2 if case.interpreted else 4):
        q, k, v = random_inputs(config, 5, tokens, rng)
        out = pool.step([4, 6, 6, 1, 6], q, k, v)
        picked = [np.stack([x[0], x[3]]) for x in (q, k, v)]
        expected = alone.step([4, 1], *picked)
        assert_close(out[[0, 3]], expected, case.outputs, "out")
        for one in (pool, alone):
            one.lengths[[4, 1]] += tokens
        assert_same_state(pool.held([4, 1]), alone.held([4, 1]), case.state)


@each_case(lambda case: case.wide)
def test_rows_that_no_call_names_keep_every_bit(case):
    config = config_for(case, lc.Scissorhands(window=4, recent=1), [4, 6], rank=2)
    pool = Pool(case, config, random_maps(config))
    rng = np.random.default_rng(4)
    idle = [0, 2, 3, 4, 6]

    def bits() -> list[bytes]:
        arrays = pool.arrays.named().values()
        if case.numpy:
            return [array[idle].tobytes() for array in arrays]
        chosen = (array[idle].contiguous().view(torch.uint8) for array in arrays)
        return [array.cpu().numpy().tobytes() for array in chosen]

    before = bits()
    for tokens in (1, 8, 1, 3):
        q, k, v = random_inputs(config, 2, tokens, rng)
        pool.step([5, 1], q, k, v)
        pool.lengths[[5, 1]] += tokens
    assert bits() == before


@each_case(lambda case: case.wide)
def test_any_rows_in_any_order_give_what_each_gives_alone(case):
    @settings(max_examples=max(3, case.examples // 10))
    @given(st.data())
    def check(data):
        policy = data.draw(st.sampled_from(POOLED))
        capacities = data.draw(st.sampled_from(CAPACITIES))
        config = config_for(case, policy, capacities, rank=data.draw(st.sampled_from([0, 2])))
        maps = random_maps(config)
        together, apart = Pool(case, config, maps), Pool(case, config, maps)
        rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
        for _ in range(data.draw(st.integers(1, 4))):
            rows = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=1, unique=True))
            tokens = data.draw(st.sampled_from([1, 1, 3, 7]))
            q, k, v = random_inputs(config, len(rows), tokens, rng)
            out = together.step(rows, q, k, v)
            for i, row in enumerate(rows):
                one = apart.step([row], *(x[i : i + 1] for x in (q, k, v)))
                assert_close(out[i : i + 1], one, 10 * case.outputs, "out")
            for pool in (together, apart):
                pool.lengths[rows] += tokens

    check()


@pytest.mark.parametrize("max_query_len", [9, None])
def test_a_gpu_pads_packed_sequences_without_a_host_read(max_query_len):
    """What a GPU does, done on the CPU: the padded way gives what the way without padding does."""
    from less_cache.call import _run_padded

    config = lc.CacheConfig(1, 4, 2, 4, [[4, 9]], lc.H2O(recent=1), rank=0)
    layer = config.layer(0)
    counts = [3, 0, 1, 9, 0, 2]
    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    inputs = random_inputs(config, 1, sum(counts), np.random.default_rng(0))
    q, k, v = (torch.tensor(x[0], dtype=torch.float32).swapaxes(0, 1) for x in inputs)
    pools = [lc.empty_arrays(layer, len(counts)) for _ in range(2)]
    lengths = torch.zeros(len(counts), dtype=torch.int64)
    plan = lc.plan_step(layer)
    expected = lc.step(plan, pools[0], q, k, v, lengths=lengths, query_start_loc=starts)

    def attend(*given):
        return plan.run(pools[1], *given)

    limit = len(q) if max_query_len is None else max_query_len
    out = _run_padded(attend, q, k, v, lengths, None, starts, limit)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(pools[1].positions, pools[0].positions)
