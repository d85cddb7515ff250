"""The step over arrays that the caller owns: what it refuses, and what a compiler sees of it."""

import pytest
import torch

import less_cache as lc
from less_cache.arrays import MAX_TOKENS
from tests.helpers import random_maps, small_config, torch_inputs

CONFIG = small_config(num_layers=1)
MAPS = random_maps(CONFIG)


def given(tokens=1, packed=False, **changes):
    q, k, v = torch_inputs(CONFIG, 2, tokens)
    if packed:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    call = {
        "plan": lc.plan_step(CONFIG.layer(0), MAPS[0]),
        "arrays": lc.empty_arrays(CONFIG.layer(0), 5),
        "q": q,
        "k": k,
        "v": v,
        "lengths": torch.zeros(2, dtype=torch.int32),
        "rows": torch.tensor([4, 1]),
    }
    if packed:
        call["query_start_loc"] = torch.tensor([0, tokens, 2 * tokens])
    return {**call, **changes}


BAD = {
    "plan": (TypeError, "plan", given(plan=CONFIG.layer(0))),
    "arrays-dict": (TypeError, "arrays", given(arrays={})),
    "arrays-of-another-rank": (
        ValueError,
        "arrays",
        given(arrays=lc.empty_arrays(CONFIG.replace(rank=3).layer(0), 5)),
    ),
    "arrays-of-another-dtype": (
        TypeError,
        "arrays",
        given(arrays=lc.empty_arrays(CONFIG.with_dtype("float64").layer(0), 5)),
    ),
    "lengths-sparse": (TypeError, "lengths", given(lengths=torch.zeros(2).int().to_sparse())),
    "rows-too-many": (ValueError, "rows", given(rows=torch.tensor([0, 1, 2]))),
    "rows-too-high": (ValueError, "rows", given(rows=torch.tensor([0, 5]))),
    "rows-negative": (ValueError, "rows", given(rows=torch.tensor([-1, 0]))),
    "rows-floats": (TypeError, "rows", given(rows=torch.tensor([0.0, 1.0]))),
    "rows-list": (TypeError, "rows", given(rows=[0, 1])),
    "lengths-negative": (ValueError, "lengths", given(lengths=torch.tensor([0, -1]))),
    "lengths-2-dims": (ValueError, "lengths", given(lengths=torch.zeros(2, 1).int())),
    "lengths-too-many": (
        ValueError,
        "lengths",
        given(lengths=torch.zeros(6, dtype=torch.int32), rows=None),
    ),
    "batch-of-another-size": (ValueError, "k", given(lengths=torch.zeros(3).int(), rows=None)),
    "packed-4-dims": (ValueError, "q", given(query_start_loc=torch.tensor([0, 1, 2]))),
    "packed-with-mask": (ValueError, "mask", given(packed=True, mask=torch.ones(2, 1).bool())),
    "starts-too-few": (
        ValueError,
        "query_start_loc",
        given(3, packed=True, query_start_loc=torch.tensor([0, 6])),
    ),
    "starts-descend": (
        ValueError,
        "query_start_loc",
        given(3, packed=True, query_start_loc=torch.tensor([0, 7, 6])),
    ),
    "starts-short": (
        ValueError,
        "query_start_loc",
        given(3, packed=True, query_start_loc=torch.tensor([0, 3, 5])),
    ),
    "max-query-len": (ValueError, "max_query_len", given(3, packed=True, max_query_len=0)),
}


@pytest.mark.parametrize(("error", "name", "call"), BAD.values(), ids=BAD)
def test_bad_calls_are_refused_by_name_and_change_nothing(error, name, call):
    arrays = call["arrays"]
    before = [x.clone() for x in arrays.named().values()] if arrays else []
    with pytest.raises(error, match=rf"^{name}\b.*: "):
        lc.step(**call)
    for old, new in zip(before, arrays.named().values() if arrays else (), strict=True):
        assert torch.equal(old, new)


PLANS = {
    "layer": (TypeError, "layer", {"layer": CONFIG}),
    "maps-missing": (ValueError, "maps", {"maps": None}),
    "maps-of-all": (TypeError, "maps", {"maps": MAPS}),
    "backend": (ValueError, "backend", {"backend": "cuda"}),
    "device": (ValueError, "device", {"device": "banana"}),
}


@pytest.mark.parametrize(("error", "name", "changes"), PLANS.values(), ids=PLANS)
def test_what_does_not_go_together_makes_no_plan(error, name, changes):
    parameters = {"layer": CONFIG.layer(0), "maps": MAPS[0], **changes}
    with pytest.raises(error, match=rf"^{name}: "):
        lc.plan_step(**parameters)


@pytest.mark.parametrize("never", [1, 6])
def test_a_full_cache_has_no_room_for_more(never):
    config = small_config(policy=lc.FullCache(), rank=0, capacity=6)
    q, k, v = torch_inputs(config, 2, never)
    call = {"lengths": torch.tensor([6, 1]), "plan": lc.plan_step(config.layer(0))}
    with pytest.raises(ValueError, match=r"^k: \d+ tokens in all"):
        lc.step(arrays=lc.empty_arrays(config.layer(0), 2), q=q, k=k, v=v, **call)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    starts = torch.tensor([0, never, 2 * never])
    with pytest.raises(ValueError, match=r"^k: \d+ tokens in all"):
        lc.step(
            call["plan"],
            lc.empty_arrays(config.layer(0), 2),
            *packed,
            lengths=call["lengths"],
            query_start_loc=starts,
        )


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_compiler_sees_one_node_that_changes_the_arrays(tokens):
    plan = lc.plan_step(CONFIG.layer(0), MAPS[0])
    rows, lengths = torch.tensor([3, 0]), torch.tensor([0, 0])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def call(arrays, q, k, v):
        return plan.run(arrays, q, k, v, lengths, rows)

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    pools = [lc.empty_arrays(CONFIG.layer(0), 5) for _ in range(2)]
    for turn in range(3):
        inputs = torch_inputs(CONFIG, 2, tokens, seed=turn)
        found, wanted = compiled(pools[0], *inputs), call(pools[1], *inputs)
        assert torch.equal(found, wanted)
        lengths += tokens
    for one, other in zip(*(pool.named().values() for pool in pools), strict=True):
        assert torch.equal(one, other)
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == ["less_cache.step_.default"]
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_whose_positions_would_wrap_are_refused(dtype):
    config = lc.CacheConfig(1, 4, 2, 4, 6, lc.SinkWindow(), rank=0)
    plan, arrays = lc.plan_step(config.layer(0)), lc.empty_arrays(config.layer(0), 2)
    q, k, v = torch_inputs(config, 2, 3)
    lengths = torch.tensor([5, MAX_TOKENS - 2], dtype=dtype)
    before = [x.clone() for x in arrays.named().values()]
    with pytest.raises(ValueError, match=r"^k: .* tokens in all, but a sequence has at most"):
        lc.step(plan, arrays, q, k, v, lengths=lengths)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"^k: .* tokens in all, but a sequence has at most"):
        lc.step(plan, arrays, *packed, lengths=lengths, query_start_loc=torch.tensor([0, 3, 6]))
    assert all(map(torch.equal, before, arrays.named().values()))
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    lc.step(plan, arrays, q, k, v, lengths=lengths, mask=mask)
