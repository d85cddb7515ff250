"""Configs and policies from anything: refused by name, or good for JSON, hashing and equality."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import less_cache as lc
from less_cache.config import PARAMETERS
from less_cache.policies import POLICIES as REGISTERED
from less_cache.policies import parse_policy, policy_from_dict
from tests.helpers import POLICIES, policy_id, small_config

from .arrays import ODDITIES
from .rule import Refusal, outcome, refused

EXAMPLES = 150
GOOD = small_config()


def goes_round(config):
    """A config that was taken can be written, read back, hashed and compared."""
    read = lc.CacheConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read == config
    assert hash(read) == hash(config)
    assert config.bytes_per_sequence() > 0
    assert config.replace() == config


@given(
    changes=st.dictionaries(
        st.sampled_from(PARAMETERS), st.sampled_from(ODDITIES), min_size=1, max_size=2
    )
)
def test_configs_of_anything(changes):
    # A capacity is refused for the policy's sake, a policy for the number of layers, and so on.
    names = (*changes, "capacity", "policy", "query_heads")
    found = outcome(lambda: small_config(**changes), *names)
    if not isinstance(found, Refusal):
        goes_round(found)


def test_each_parameter_alone():
    """Without chance: every parameter with every oddity."""
    for name in PARAMETERS:
        for odd in ODDITIES:
            names = {"num_layers": ("num_layers", "policy", "capacity")}.get(name, (name,))
            names = (*names, "query_heads") if name == "kv_heads" else names
            found = outcome(lambda: small_config(**{name: odd}), *names)  # noqa: B023
            if not isinstance(found, Refusal):
                goes_round(found)


@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_policies_of_anything(policy):
    for field in dataclasses.fields(policy):
        for odd in ODDITIES:
            found = outcome(
                lambda: dataclasses.replace(policy, **{field.name: odd}),  # noqa: B023
                field.name,
            )
            if not isinstance(found, Refusal):
                config = outcome(
                    lambda: small_config(policy=found, capacity=100),  # noqa: B023
                    "capacity",
                )
                if not isinstance(config, Refusal):
                    goes_round(config)


@given(
    policy=st.sampled_from([policy for policy in POLICIES if policy_id(policy) != "FullCache"]),
    rank=st.sampled_from([0, 2]),
    recent=st.booleans(),
    dtype=st.sampled_from(["float64", "float32", "bfloat16"]),
    state_dtype=st.sampled_from([None, "float64", "float32"]),
    capacities=st.lists(
        st.one_of(st.integers(1, 40), st.sampled_from([0.05, 0.5, "10%"])), min_size=2, max_size=2
    ),
    positions=st.lists(st.sampled_from([100, 1000]), min_size=2, max_size=2),
)
def test_a_replaced_config_is_as_a_fresh_one(
    policy, rank, recent, dtype, state_dtype, capacities, positions
):
    if recent and not isinstance(policy, lc.TOVA):
        policy = dataclasses.replace(policy, recent=None)
    parameters = {"policy": policy, "rank": rank, "state_dtype": state_dtype}

    def fresh(i, **changes):
        sizes = {"capacity": capacities[i], "max_positions": positions[i]}
        return small_config(**{**parameters, **sizes, "dtype": (dtype, "float16")[i], **changes})

    first, second = (outcome(lambda i=i: fresh(i), "capacity") for i in range(2))
    if isinstance(first, Refusal) or isinstance(second, Refusal):
        return
    changes = {"capacity": capacities[1], "max_positions": positions[1]}
    assert first.replace(**changes).with_dtype("float16") == second
    plus = first.baseline_plus()
    assert plus == fresh(0, rank=0, capacity=plus.capacity)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.sampled_from(["", "x", "H2O", "5%", "float32", "torch.float16", "\0", "ñ"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["name", "recent", "sinks", "x"]), inner, max_size=3),
    ),
    max_leaves=5,
)


@given(data=st.data(), value=JSON)
def test_configs_from_any_json(data, value):
    good = GOOD.to_dict()
    place = data.draw(st.sampled_from(["all", "missing", "extra", "policy", *good]))
    spoilt = {**good}
    if place == "all":
        spoilt = value
    elif place == "missing":
        spoilt.pop(data.draw(st.sampled_from(sorted(good))))
    elif place == "policy":
        spoilt["policy"] = [value, *good["policy"][1:]]
    else:
        spoilt[place] = value
    found = outcome(
        lambda: lc.CacheConfig.from_dict(spoilt), "config", "policy", *REGISTERED, *good
    )
    if not isinstance(found, Refusal):
        goes_round(found)


@given(data=st.data(), value=JSON)
def test_policies_from_any_json(data, value):
    good = data.draw(st.sampled_from(POLICIES)).to_dict()
    field = data.draw(st.sampled_from([*good, "extra"]))
    found = outcome(lambda: policy_from_dict({**good, field: value}), "policy", field)
    if not isinstance(found, Refusal):
        assert policy_from_dict(json.loads(json.dumps(found.to_dict()))) == found
    outcome(lambda: policy_from_dict(value), "policy", "sinks", "recent")


TEXTS = st.one_of(
    st.text(max_size=20),
    st.builds(
        lambda name, key, value: f"{name}:{key}={value}",
        st.sampled_from([*map(str.lower, REGISTERED), "h2-o", "H_2_O", "lru", ""]),
        st.sampled_from(["recent", "sinks", "window", "factor", "neighbours", "", "x", " recent "]),
        st.sampled_from(["1", "-1", "1.5", "nan", "inf", "1e400", "", "x", "1e3", "²", "1_0"]),
    ),
)


@given(text=TEXTS)
def test_policies_from_any_text(text):
    fields = ("recent", "sinks", "window", "factor", "neighbours")
    found = outcome(lambda: parse_policy(text), "policy", *fields)
    if not isinstance(found, Refusal):
        assert policy_from_dict(found.to_dict()) == found


@given(odd=st.sampled_from(ODDITIES))
def test_what_is_asked_of_a_config(odd):
    for name, call in {
        "layer": GOOD.layer,
        "dtype": GOOD.with_dtype,
        "rank": lambda x: GOOD.shard(x, 2),
        "world": lambda x: GOOD.shard(0, x),
        "bytes_per_sequence": lambda x: lc.CacheConfig.for_budget(
            bytes_per_sequence=x,
            policy=lc.H2O(),
            num_layers=2,
            query_heads=4,
            kv_heads=2,
            head_dim=4,
        ),
    }.items():
        found = outcome(lambda: call(odd), name)  # noqa: B023
        assert isinstance(found, Refusal) or name in ("dtype", "bytes_per_sequence") or odd == 0
    refused(lambda: lc.CacheConfig.from_model(odd, capacity=6, policy=lc.H2O()), "model_config")
    refused(lambda: GOOD.replace(banana=odd), "banana")
