"""`CacheConfig`: what it accepts, what it refuses, and what a cache costs."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import less_cache as lc
from less_cache.dtypes import dtype_name
from less_cache.integrations.introspection import full_attention_layers
from tests.helpers import POLICIES, policy_id, random_maps, small_config

BAD = {
    "no-layers": ("num_layers", ValueError, {"num_layers": 0}),
    "layers-as-text": ("num_layers", TypeError, {"num_layers": "2"}),
    "layers-as-bool": ("num_layers", TypeError, {"num_layers": True}),
    "no-query-heads": ("query_heads", ValueError, {"query_heads": 0}),
    "uneven-groups": ("query_heads", ValueError, {"query_heads": 5}),
    "more-kv-heads": ("query_heads", ValueError, {"kv_heads": 8}),
    "no-kv-heads": ("kv_heads", ValueError, {"kv_heads": 0}),
    "fractional-kv-heads": ("kv_heads", TypeError, {"kv_heads": 2.0}),
    "negative-head-dim": ("head_dim", ValueError, {"head_dim": -4}),
    "negative-rank": ("rank", ValueError, {"rank": -1}),
    "rank-none": ("rank", TypeError, {"rank": None}),
    "rank-as-text": ("rank", TypeError, {"rank": "22"}),
    "rank-of-3-layers": ("rank", ValueError, {"rank": [2, 2, 2]}),
    "rank-of-no-layers": ("rank", ValueError, {"rank": []}),
    "rank-negative-in-a-layer": ("rank", ValueError, {"rank": [2, -1]}),
    "rank-none-in-a-layer": ("rank", TypeError, {"rank": [2, None]}),
    "rank-of-heads": ("rank", TypeError, {"rank": [2, [2, 2]]}),
    "codes-of-3-layers": ("quantization", ValueError, {"quantization": [None] * 3}),
    "codes-as-number": ("quantization", TypeError, {"quantization": [None, 3]}),
    "codes-of-key-norms": (
        "quantization",
        ValueError,
        {"policy": lc.KeyNorm(), "quantization": [None, lc.Quantization(3, 3, "calibrated")]},
    ),
    "no-hidden": ("hidden", ValueError, {"hidden": 0}),
    "capacity-0": ("capacity", ValueError, {"capacity": 0}),
    "capacity-negative": ("capacity", ValueError, {"capacity": -3}),
    "capacity-as-bool": ("capacity", TypeError, {"capacity": True}),
    "capacity-as-text": ("capacity", TypeError, {"capacity": "6"}),
    "capacity-none": ("capacity", TypeError, {"capacity": None}),
    "capacity-nan": ("capacity", ValueError, {"capacity": math.nan, "max_positions": 9}),
    "share-above-1": ("capacity", ValueError, {"capacity": 1.5, "max_positions": 9}),
    "share-of-0": ("capacity", ValueError, {"capacity": 0.0, "max_positions": 9}),
    "share-of-nothing": ("capacity", ValueError, {"capacity": 0.5}),
    "capacity-of-3-layers": ("capacity", ValueError, {"capacity": [6, 6, 6]}),
    "sinks-and-recent": ("capacity", ValueError, {"policy": lc.SinkWindow(4, 2)}),
    "recent-too-many": ("capacity", ValueError, {"policy": lc.H2O(recent=6)}),
    "one-layer-too-small": ("capacity", ValueError, {"policy": lc.KeyNorm(2), "capacity": [6, 2]}),
    "policy-none": ("policy", TypeError, {"policy": None}),
    "policy-as-text": ("policy", TypeError, {"policy": "h2o"}),
    "policy-as-class": ("policy", TypeError, {"policy": lc.H2O}),
    "policy-of-3-layers": ("policy", ValueError, {"policy": [lc.H2O()] * 3}),
    "scale-0": ("scale", ValueError, {"scale": 0.0}),
    "scale-nan": ("scale", ValueError, {"scale": math.nan}),
    "softcap-negative": ("softcap", ValueError, {"softcap": -1.0}),
    "softcap-infinite": ("softcap", ValueError, {"softcap": math.inf}),
    "softcap-as-text": ("softcap", TypeError, {"softcap": "50"}),
    "dtype-integer": ("dtype", ValueError, {"dtype": torch.int32}),
    "dtype-unknown": ("dtype", ValueError, {"dtype": "float8"}),
    "state-dtype-bool": ("state_dtype", ValueError, {"state_dtype": "bool"}),
    "no-positions": ("max_positions", ValueError, {"max_positions": 0}),
}


@pytest.mark.parametrize(("argument", "error", "changes"), BAD.values(), ids=BAD)
def test_bad_parameters_are_refused_by_name(argument, error, changes):
    with pytest.raises(error, match=rf"^{argument}: "):
        small_config(**changes)


def test_the_least_capacity_is_sinks_and_recent_and_one():
    policy = lc.SinkWindow(sinks=3, recent=2)
    assert small_config(policy=policy, capacity=6).capacities == ((6, 6), (6, 6))
    with pytest.raises(ValueError, match=r"^capacity: got 5, .* = 6 slots"):
        small_config(policy=policy, capacity=5)


def test_numbers_of_other_libraries_are_numbers():
    config = small_config(capacity=np.int64(6), rank=np.int32(2), scale=np.float32(0.5))
    assert config == small_config(scale=0.5)


@pytest.mark.parametrize(
    ("share", "positions", "slots"),
    [(0.05, 4096, 205), (1.0, 10, 10), (0.07, 100, 7), (0.3, 10, 3), (1e-9, 10**10, 10)],
)
def test_a_share_counts_slots_rounded_up(share, positions, slots):
    config = small_config(capacity=share, max_positions=positions, policy=lc.KeyNorm())
    assert config.capacities == ((slots,) * 2,) * 2


def test_layers_may_differ():
    config = small_config(capacity=[6, 8], policy=[lc.H2O(recent=1), lc.TOVA()])
    assert config.capacities == ((6, 6), (8, 8))
    assert config.layer(1).policy == lc.TOVA()
    assert config.layer(0).capacity == 6
    with pytest.raises(ValueError, match=r"^layer: "):
        config.layer(2)
    with pytest.raises(ValueError, match=r"^layer: "):
        config.layer(-1)


def test_two_spellings_of_one_cache_are_equal():
    one = small_config(capacity=6, policy=lc.H2O(), dtype=torch.float16)
    other = small_config(
        capacity=[6, 6], policy=[lc.H2O(recent=2)] * 2, dtype=np.float16, scale=0.5
    )
    assert one == other
    assert hash(one) == hash(other)
    assert one != small_config(capacity=6, policy=lc.H2O(recent=1), dtype="float16")


def test_rank_and_bits_may_differ_by_layer():
    three = lc.Quantization(3, 3)
    config = small_config(rank=[0, np.int64(4)], quantization=[None, three])
    assert (config.rank, config.ranks, config.has_state) == ((0, 4), (0, 4), True)
    assert config.quantization == config.quantizations == (None, three)
    assert [layer.rank for layer in config.layers] == [0, 4]
    assert [layer.quantization for layer in config.layers] == [None, three]
    assert config.has_codes
    plain, coded = (small_config(num_layers=1, rank=r, quantization=q) for r, q in
                    ((0, None), (4, three)))  # fmt: skip
    parts = plain.bytes_per_sequence() + coded.bytes_per_sequence()
    assert config.bytes_per_sequence() == parts
    assert config.bytes_per_sequence() == lc.CacheManager(
        config, random_maps(config)
    ).init(1).nbytes  # fmt: skip
    assert not small_config(rank=0).has_state
    assert not small_config().has_codes


def test_one_rank_in_all_layers_is_one_rank():
    three = lc.Quantization(3, 3)
    one = small_config(rank=4, quantization=three)
    other = small_config(rank=[4, 4], quantization=(three, lc.Quantization(3, 3)))
    assert (one, hash(one), one.to_dict()) == (other, hash(other), other.to_dict())
    assert (other.rank, other.quantization) == (4, three)
    assert small_config(quantization=[None, None]).quantization is None
    assert one != small_config(rank=[4, 3], quantization=three)
    assert one != small_config(rank=4, quantization=[three, None])


def test_baseline_plus_spends_each_layers_own_state():
    config = small_config(rank=[0, 8], capacity=9)
    plus = config.baseline_plus()
    assert plus.rank == 0
    assert plus.capacities[0] == (9, 9)
    assert plus.capacities[1][0] > 9
    assert plus.bytes_per_sequence() >= config.bytes_per_sequence()


def test_the_default_scale_is_one_over_the_root_of_the_head_dim():
    assert small_config(head_dim=64).scale == 0.125
    assert small_config(head_dim=64, scale=0.2).layer(0).scale == 0.2


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small_config().rank = 3


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (torch.bfloat16, "bfloat16"),
        (np.float64, "float64"),
        (np.dtype("float16"), "float16"),
        ("float32", "float32"),
    ],
)
def test_dtypes_of_any_library_have_one_name(given, name):
    assert dtype_name(given) == name


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "expected"),
    [
        ("float16", None, "float32"),
        ("float64", None, "float64"),
        ("bfloat16", "float64", "float64"),
    ],
)
def test_the_low_rank_state_is_float32_unless_asked_otherwise(dtype, state_dtype, expected):
    assert small_config(dtype=dtype, state_dtype=state_dtype).state_dtype == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.bfloat16, np.float16])
def test_sixteen_bits_are_too_few_for_the_low_rank_state(dtype):
    refused = r"^state_dtype: got '(b)?float16', but H and z are running sums"
    with pytest.raises(ValueError, match=refused):
        small_config(state_dtype=dtype)
    data = {**small_config().to_dict(), "state_dtype": dtype_name(dtype)}
    with pytest.raises(ValueError, match=refused):
        lc.CacheConfig.from_dict(data)


def test_another_dtype_takes_the_state_along_only_where_it_follows():
    assert small_config().with_dtype("float64").state_dtype == "float64"
    assert small_config(state_dtype="float32").with_dtype("float64").state_dtype == "float32"
    assert small_config(dtype="float64").with_dtype(torch.float16).state_dtype == "float32"


@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_to_dict_and_back_is_the_same_config(policy):
    config = small_config(
        policy=[policy, lc.H2O()], capacity=[9, 6], softcap=50.0, dtype="bfloat16", hidden=16
    )
    data = json.loads(json.dumps(config.to_dict()))
    assert lc.CacheConfig.from_dict(data) == config
    with pytest.raises(ValueError, match="format"):
        lc.CacheConfig.from_dict({**data, "format": 0})
    with pytest.raises(ValueError, match="more"):
        lc.CacheConfig.from_dict({**data, "more": 1})
    del data["rank"]
    with pytest.raises(ValueError, match="rank"):
        lc.CacheConfig.from_dict(data)


def test_bytes_are_counted_by_hand():
    config = small_config(dtype="float16", policy=lc.H2O())
    # A slot: key and value of 4 halves, a score, a position. The state: 2 rows of 4 + 1 floats.
    assert config.layer(0).slot_bytes == 2 * 4 * 2 + 4 + 4
    assert config.layer(0).low_rank_bytes == 2 * (4 + 1) * 4
    assert config.bytes_per_sequence() == 2 * (2 * (6 * 24 + 40) + 4)
    history = small_config(dtype="float16", policy=lc.Scissorhands())
    assert history.layer(0).slot_bytes == config.layer(0).slot_bytes + 8
    assert config.bytes_per_sequence("float32") == 2 * (2 * (6 * 40 + 40) + 4)
    assert config.layer(0).fixed_bytes == 2 * 40 + 4
    assert config.full_cache_bytes(10) == 10 * 2 * 2 * 2 * 4 * 2
    assert config.full_cache_bytes(10, torch.float32) == 10 * 2 * 2 * 2 * 4 * 4


@given(
    budget=st.integers(1, 20_000),
    policy=st.sampled_from(POLICIES[1:]),
    rank=st.integers(0, 4),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_for_budget_takes_all_that_fits_and_no_more(budget, policy, rank, dtype):
    shapes = {"num_layers": 3, "query_heads": 4, "kv_heads": 2, "head_dim": 8}
    parameters = {**shapes, "rank": rank, "dtype": dtype, "policy": policy}
    least = policy.sinks + (policy.recent or 0) + 1
    smallest = lc.CacheConfig(capacity=least, **parameters).bytes_per_sequence()
    if budget < smallest:
        with pytest.raises(ValueError, match=rf"^bytes_per_sequence: .* {smallest}$"):
            lc.CacheConfig.for_budget(bytes_per_sequence=budget, **parameters)
        return
    config = lc.CacheConfig.for_budget(bytes_per_sequence=budget, **parameters)
    assert config.bytes_per_sequence() <= budget
    more = lc.CacheConfig(capacity=config.capacity + 1, **parameters)
    assert more.bytes_per_sequence() > budget


def test_for_budget_chooses_the_capacity_itself():
    with pytest.raises(TypeError, match=r"^capacity: "):
        lc.CacheConfig.for_budget(
            bytes_per_sequence=9999,
            policy=lc.H2O(),
            capacity=4,
            num_layers=1,
            query_heads=1,
            kv_heads=1,
            head_dim=4,
        )


@given(
    rank=st.integers(1, 16),
    head_dim=st.integers(1, 128),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
)
def test_baseline_plus_spends_the_states_bytes_on_slots(rank, head_dim, dtype):
    config = small_config(rank=rank, head_dim=head_dim, dtype=dtype)
    plus = config.baseline_plus()
    assert plus.rank == 0
    assert plus.bytes_per_sequence() >= config.bytes_per_sequence()
    slots = config.layer(0).slot_bytes * config.kv_heads * config.num_layers
    assert plus.bytes_per_sequence() < config.bytes_per_sequence() + slots
    # Half of the slots are recent ones, whatever their number: as if made for it at once.
    assert plus == small_config(rank=0, head_dim=head_dim, dtype=dtype, capacity=plus.capacity)


def test_replacing_works_from_what_was_asked():
    config = small_config(policy=lc.H2O(), capacity=100)
    assert config.policy.recent == 49
    assert config.replace(capacity=20).policy.recent == 9
    assert config.replace(capacity=1000).policy.recent == 499
    share = small_config(capacity=0.5, max_positions=20, policy=lc.SinkWindow())
    assert share.replace(max_positions=40).capacity == 20
    wide = small_config(state_dtype="float64")
    assert wide.with_dtype("float16").state_dtype == "float64"
    assert small_config(dtype="float64").with_dtype("float32").state_dtype == "float32"
    assert config.replace(scale=2.0).replace(head_dim=16).scale == 2.0
    assert config.replace(head_dim=16).scale == 0.25
    with pytest.raises(TypeError, match=r"^slots: no parameter"):
        config.replace(slots=3)


def test_heads_may_differ():
    config = small_config(capacity=[6, [8, "50%"]], max_positions=20)
    assert config.capacities == ((6, 6), (8, 10))
    assert [policy.recent for policy in config.layer(1).policies] == [3, 4]
    layer = config.layer(1)
    assert (layer.slots, layer.offsets, layer.is_uniform) == (18, (0, 8), False)
    assert layer.bytes_per_sequence == 18 * layer.slot_bytes + 2 * layer.low_rank_bytes + 4
    assert [run.layer.capacity for run in layer.runs] == [8, 10]
    assert [len(config.layer(0).runs)] == [1]
    assert lc.CacheConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"^capacity: differs by head"):
        _ = layer.capacity
    with pytest.raises(ValueError, match=r"^capacity: got 3 entries for layer 1, .* 2: one a KV"):
        small_config(capacity=[6, [8, 9, 10]])
    with pytest.raises(ValueError, match=r"^capacity: got 1, "):
        small_config(capacity=[6, [8, 1]], policy=lc.SinkWindow(sinks=2))


def test_runs_are_heads_of_equal_capacity_side_by_side():
    config = small_config(query_heads=12, kv_heads=6, capacity=[6, [8, 8, 9, 8, 7, 7]])
    runs = config.layer(1).runs
    assert [(run.first, run.heads, run.offset) for run in runs] == [
        (0, 2, 0),
        (2, 1, 16),
        (3, 1, 25),
        (4, 2, 33),
    ]
    assert [run.query_heads for run in runs] == [
        slice(0, 4),
        slice(4, 6),
        slice(6, 8),
        slice(8, 12),
    ]
    assert [run.slots for run in runs][-1] == slice(33, 47)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_shards_hold_the_heads_once(world):
    config = small_config(query_heads=12, kv_heads=6, capacity=[6, [8, 8, 9, 8, 7, 7]], scale=0.3)
    shards = [config.shard(rank, world) for rank in range(world)]
    assert sum(shard.kv_heads for shard in shards) == 6
    assert sum(shard.bytes_per_sequence() - 8 for shard in shards) == (
        config.bytes_per_sequence() - 8
    )
    joined = [capacity for shard in shards for capacity in shard.capacities[1]]
    assert joined == [8, 8, 9, 8, 7, 7]
    assert {shard.layer(0).scale for shard in shards} == {0.3}


def test_more_processes_than_kv_heads_share_them():
    config = small_config(query_heads=8, kv_heads=2, capacity=[6, [8, 9]])
    shards = [config.shard(rank, 4) for rank in range(4)]
    assert [shard.capacities[1] for shard in shards] == [(8,), (8,), (9,), (9,)]
    assert {shard.query_heads for shard in shards} == {2}
    for world, rank in ((3, 0), (4, 4), (0, 0), (16, 0)):
        with pytest.raises(ValueError, match=r"^(world|rank): "):
            config.shard(rank, world)


def test_numpys_numbers_are_pythons():
    config = small_config(
        capacity=[np.int64(6), [np.int32(7), np.float64(0.5)]],
        rank=np.int64(2),
        max_positions=np.int64(16),
    )
    assert json.loads(json.dumps(config.to_dict()))["capacity"] == [6, [7, 0.5]]
    assert config.capacities[1] == (7, 8)


def model(**changes):
    attributes = {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "hidden_size": 64,
        "max_position_embeddings": 100,
    }
    return SimpleNamespace(**{**attributes, **changes})


MODELS = {
    "mha": ({}, {"kv_heads": 8, "head_dim": 8, "num_layers": 3, "scale": 8**-0.5}),
    "gqa": ({"num_key_value_heads": 2}, {"kv_heads": 2, "query_heads": 8}),
    "head-dim": ({"head_dim": 32}, {"head_dim": 32, "scale": 32**-0.5}),
    "gemma-2": (
        {
            "attn_logit_softcapping": 50.0,
            "query_pre_attn_scalar": 64,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        {"softcap": 50.0, "scale": 0.125, "num_layers": 2},
    ),
    "falcon-7b": (
        {
            "model_type": "falcon",
            "new_decoder_architecture": False,
            "multi_query": True,
            "num_kv_heads": 8,
        },
        {"kv_heads": 1},
    ),
    "falcon-40b": (
        {
            "model_type": "falcon",
            "new_decoder_architecture": True,
            "multi_query": True,
            "num_kv_heads": 4,
        },
        {"kv_heads": 4},
    ),
}


@pytest.mark.parametrize(("changes", "expected"), MODELS.values(), ids=MODELS)
def test_a_models_configuration_gives_the_shapes(changes, expected):
    config = lc.CacheConfig.from_model(model(**changes), capacity=0.1, policy=lc.H2O())
    assert config.capacity == 10
    for name, value in expected.items():
        assert getattr(config, name) == value, name


def test_a_model_inside_another_is_found():
    outer = SimpleNamespace(get_text_config=model)
    assert lc.CacheConfig.from_model(outer, capacity=9, policy=lc.H2O()).query_heads == 8


def test_parameters_override_what_the_model_says():
    config = lc.CacheConfig.from_model(model(), capacity=9, policy=lc.H2O(), dtype="float16")
    assert config.dtype == "float16"
    assert lc.CacheConfig.from_model(model(), capacity=9, policy=lc.H2O(), kv_heads=2).group == 4


def test_without_a_capacity_the_models_longest_sequence_counts():
    config = lc.CacheConfig.from_model(model(), policy=lc.FullCache())
    assert config.capacity == 100
    with pytest.raises(ValueError, match=r"^capacity: "):
        lc.CacheConfig.from_model(model(max_position_embeddings=None), policy=lc.FullCache())


def test_layers_with_a_window_are_not_counted():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert full_attention_layers(model(layer_types=kinds)) == [1]
    with pytest.raises(ValueError, match=r"^model_config: every layer has a sliding window"):
        full_attention_layers(model(sliding_window=32))


def test_what_is_no_model_configuration_is_refused():
    with pytest.raises(ValueError, match=r"^model_config: .* has no attribute"):
        lc.CacheConfig.from_model(SimpleNamespace(), capacity=4, policy=lc.H2O())
