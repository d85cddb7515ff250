"""What maps say of themselves."""

from __future__ import annotations

import pytest

import less_cache as lc
from less_cache.provenance import codes_text, mismatches, ranks_text, slots_text, trained_for
from tests.helpers import random_maps, small_config
from tests.quantization.fitted import fitted


def maps_for(config, **record):
    maps = random_maps(small_config())
    record = {"config": config.to_dict(), **record}
    return lc.FeatureMaps(maps.layers, model_id="owner/llama", record=record)


def test_the_last_training_counts():
    last = small_config(capacity=7)
    maps = maps_for(small_config(), distill={"config": last.to_dict()})
    assert trained_for(maps) == last
    assert trained_for(maps_for(small_config())) == small_config()


@pytest.mark.parametrize("record", [{}, {"config": 3}, {"config": {"format": 99}}])
def test_maps_may_say_nothing(record):
    maps = lc.FeatureMaps(random_maps(small_config()).layers, record=record)
    assert trained_for(maps) is None
    assert mismatches(maps, small_config(), "any/model") == []


def test_the_same_use_is_no_mismatch():
    maps = maps_for(small_config())
    assert mismatches(maps, small_config(dtype="float16"), "owner/llama") == []
    resolved = small_config(policy=lc.H2O(recent=2))
    assert resolved.policies == small_config().policies
    assert mismatches(maps, resolved) == []


def test_every_mismatch_is_named_once():
    maps = maps_for(small_config())
    used = small_config(policy=lc.TOVA(), capacity=[9, [4, 9]])
    model, policy, capacity = mismatches(maps, used, "owner/mistral")
    assert model == "trained for the model owner/llama, not owner/mistral"
    assert policy == "trained for H2O(sinks=0, recent=2), not TOVA(sinks=0, recent=1)"
    assert capacity == "trained for a capacity of 6, not 4 to 9, mean 7.8"
    # Another capacity alone is no other policy, though `recent` follows it.
    assert mismatches(maps, small_config(capacity=20)) == ["trained for a capacity of 6, not 20"]


def test_what_differs_by_layer_is_told_by_layer():
    three, other = lc.Quantization(3, 3), lc.Quantization(4, 2, "calibrated")
    assert ranks_text(8) == "8"
    assert ranks_text((0, 0, 8, 0)) == "0 in layers 0-1, 8 in layer 2, 0 in layer 3"
    assert codes_text((None, three, three, other)) == (
        "as they are in layer 0, in 3 bits (hadamard) in layers 1-2, "
        "in 4 and 2 bits (calibrated) in layer 3"
    )
    used = small_config(quantization=[None, three])
    assert mismatches(maps_for(small_config()), used) == [
        "trained for pairs stored as they are, not as they are in layer 0, "
        "in 3 bits (hadamard) in layer 1"
    ]
    assert mismatches(maps_for(used), used) == []


def test_how_pairs_are_stored_is_part_of_the_use():
    three = lc.Quantization(3, 3)
    calibrated = small_config(quantization=lc.Quantization(3, 2, "calibrated"))
    plain = maps_for(small_config())
    assert mismatches(plain, small_config(quantization=three)) == [
        "trained for pairs stored as they are, not in 3 bits (hadamard)"
    ]
    assert mismatches(maps_for(small_config(quantization=three)), calibrated) == [
        "trained for pairs stored in 3 bits (hadamard), not in 3 and 2 bits (calibrated)"
    ]
    bases, others = (fitted(calibrated, seed) for seed in (0, 7))
    made = maps_for(calibrated, transforms_sha256=bases.digest)
    last = {"config": calibrated.to_dict(), "transforms_sha256": bases.digest}
    for maps in (made, maps_for(calibrated, transforms_sha256="x", distill=last)):
        assert mismatches(maps, calibrated, transforms=bases) == []
        assert mismatches(maps, calibrated, transforms=others) == [
            "trained with other transforms than those given"
        ]


def test_slots_in_words():
    assert slots_text(1052) == "1,052"
    assert slots_text((52, 52)) == "52"
    assert slots_text((10, (20, 60))) == "10 to 60, mean 25.0"
