"""With a cache that evicts nothing, each family's model must compute what it always did."""

import pytest
import torch

import less_cache as lc
from tests.integrations.models import FAMILIES, full, less, model_of, positions, prompts

EITHER = [
    *((f, None) for f in FAMILIES),
    ("llama", "eager"),
    ("gemma3", "eager"),
    ("qwen2_sliding", "eager"),
]
ids_of = [f"{f}-{a}" if a else f for f, a in EITHER]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize(("family", "attention"), EITHER, ids=ids_of)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_with_padding(family, attention, side):
    model = model_of(family, attention)
    ids, mask = prompts([9, 4, 7], side=side)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    expected = model(**inputs).logits
    with lc.attach(model, full(model)):
        found = model(**inputs).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], **TOLERANCE)


@pytest.mark.parametrize(("family", "attention"), EITHER, ids=ids_of)
@torch.no_grad()
def test_chunks_and_steps_continue_one_another(family, attention):
    model = model_of(family, attention)
    ids, mask = prompts([14, 8])
    place = positions(mask)
    expected = model(ids, attention_mask=mask, position_ids=place).logits
    found = []
    with lc.attach(model, full(model)) as handle:
        cache = handle.new_cache()
        for start, stop in [(0, 5), (5, 6), (6, 10), (10, 11), (11, 12), (12, 14)]:
            part = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=place[:, start:stop],
                past_key_values=cache,
            )
            assert part.past_key_values is cache
            found.append(part.logits)
            assert cache.get_seq_length() == stop
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], **TOLERANCE)
    assert cache.state.length.tolist() == [14, 8]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family):
    model = model_of(family)
    ids, mask = prompts([9, 4, 7])
    settings = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    expected = model.generate(ids, **settings)
    with lc.attach(model, full(model)):
        found = model.generate(ids, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams(family):
    model = model_of(family)
    ids, mask = prompts([9, 4])
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    expected = model.generate(ids, **settings, num_return_sequences=2)
    with lc.attach(model, full(model)):
        found = model.generate(ids, **settings, num_return_sequences=2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_does_not_change_what_is_evicted(family):
    model = model_of(family)
    config, maps = less(model, capacity=5)
    lengths = [11, 6, 8]
    generator = torch.Generator().manual_seed(3)
    tail = torch.randint(3, 97, (3, 3), generator=generator)
    results = {}
    for side in ("left", "right"):
        ids, mask = prompts(lengths, side=side)
        ids, mask = torch.cat([ids, tail], 1), torch.cat([mask, torch.ones_like(tail)], 1)
        place = positions(mask)
        out = []
        with lc.attach(model, config, maps) as handle:
            cache = handle.new_cache()
            for stop in (11, 12, 13, 14):
                start = 0 if stop == 11 else stop - 1
                logits = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=place[:, start:stop],
                    past_key_values=cache,
                ).logits
                out.append(logits)
        results[side] = torch.cat(out, 1), mask.bool(), cache.state
    (left, left_mask, state), (right, right_mask, other) = results["left"], results["right"]
    if not cache.sliding_layers:
        for row in range(3):
            torch.testing.assert_close(
                left[row][left_mask[row]], right[row][right_mask[row]], **TOLERANCE
            )
        (run,) = config.layer(0).runs
        for a, b in zip(state.layers, other.layers, strict=True):
            assert (a.H - b.H).abs().max() <= 1e-4 * a.H.abs().max()
            held = [x.of_run(run).positions.sort(2).values for x in (a, b)]
            assert torch.equal(*held)
    assert state.length.tolist() == other.length.tolist() == [14, 9, 11]
    assert all((layer.z > 0).any() for layer in state.layers)
    for row, length in enumerate(lengths):
        ids, _ = prompts(lengths)
        alone = torch.cat([ids[row : row + 1, 11 - length :], tail[row : row + 1]], 1)
        with lc.attach(model, config, maps) as handle:
            cache = handle.new_cache()
            out = [model(alone[:, :length], past_key_values=cache).logits]
            out += [
                model(alone[:, i : i + 1], past_key_values=cache).logits
                for i in range(length, length + 3)
            ]
        torch.testing.assert_close(torch.cat(out, 1)[0], left[row][left_mask[row]], **TOLERANCE)
