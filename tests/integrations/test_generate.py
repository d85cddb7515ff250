"""generate() of an attached model: decoding methods, turns, padding, and what it refuses."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import less_cache as lc
from tests.integrations.models import full, less, model_of, prompts

GREEDY = {"do_sample": False, "eos_token_id": None}
SLIDING = ["llama", "gemma3", "falcon_new"]


def test_sampling_with_the_same_seed():
    model = model_of("llama")
    ids, mask = prompts([9, 4])
    settings = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": True, "top_k": 0}
    torch.manual_seed(5)
    expected = model.generate(ids, **settings, num_return_sequences=3)
    with lc.attach(model, full(model)):
        torch.manual_seed(5)
        found = model.generate(ids, **settings, num_return_sequences=3)
    assert found.shape[0] == 6
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", SLIDING)
def test_right_padded_rows_go_on_as_if_alone(family):
    model = model_of(family)
    config, maps = less(model)
    ids, mask = prompts([9, 4, 7], side="right")
    with lc.attach(model, config, maps) as handle:
        cache = handle.new_cache()
        found = model.generate(
            ids, attention_mask=mask, max_new_tokens=3, past_key_values=cache, **GREEDY
        )
        for row, length in enumerate([9, 4, 7]):
            alone = model.generate(ids[row : row + 1, :length], max_new_tokens=3, **GREEDY)
            if family != "gemma3":
                assert torch.equal(found[row, 9:], alone[0, length:])
    assert cache.state.length.tolist() == [11, 6, 9]
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("family", SLIDING)
def test_a_prompt_in_chunks(family):
    model = model_of(family)
    ids, mask = prompts([12, 7])
    settings = {"attention_mask": mask, "max_new_tokens": 6, **GREEDY}
    expected = model.generate(ids, **settings)
    with lc.attach(model, full(model)):
        found = model.generate(ids, prefill_chunk_size=5, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", SLIDING)
def test_a_second_turn_on_the_same_cache(family):
    model = model_of(family)
    ids, mask = prompts([9, 4])
    more, _ = prompts([5, 5], seed=2)
    expected = []
    for attached in (False, True):
        cache = DynamicCache(config=model.config)
        handle = None
        if attached:
            handle = lc.attach(model, full(model))
            cache = handle.new_cache(batch_size=2)
        first = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, past_key_values=cache, **GREEDY
        )
        both = torch.cat([first, more], 1)
        wide = torch.cat([mask, torch.ones(2, 6 + 5, dtype=torch.long)], 1)
        second = model.generate(
            both, attention_mask=wide, max_new_tokens=6, past_key_values=cache, **GREEDY
        )
        expected.append(second)
        if handle:
            assert cache.get_seq_length() == second.shape[1] - 1
            assert cache.state.length.tolist() == [25, 20]
            handle.detach()
    assert torch.equal(*expected)


def test_a_second_turn_with_eviction_is_one_long_conversation():
    model = model_of("llama")
    config, maps = less(model)
    ids, _ = prompts([9])
    more, _ = prompts([4], seed=2)
    with lc.attach(model, config, maps) as handle:
        cache, manual = handle.new_cache(), handle.new_cache()
        first = model.generate(ids, max_new_tokens=5, past_key_values=cache, **GREEDY)
        both = torch.cat([first, more], 1)
        second = model.generate(both, max_new_tokens=5, past_key_values=cache, **GREEDY)
        with torch.no_grad():
            model(ids, past_key_values=manual)
            for i in range(9, 13):
                model(first[:, i : i + 1], past_key_values=manual)
            logits = model(both[:, 13:], past_key_values=manual).logits
    assert logits[0, -1].argmax() == second[0, both.shape[1]]


def test_a_turn_that_does_not_cover_the_first_is_refused():
    model = model_of("llama")
    with lc.attach(model, full(model)) as handle:
        cache = handle.new_cache()
        model.generate(prompts([9])[0], max_new_tokens=3, past_key_values=cache, **GREEDY)
        before = cache.state.length.clone()
        with pytest.raises(ValueError, match=r"attention_mask: covers 8 tokens.*seen 11"):
            model.generate(prompts([8])[0], max_new_tokens=3, past_key_values=cache)
        assert torch.equal(cache.state.length, before)


def test_streaming_gives_the_tokens_one_by_one():
    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, tokens):
            self.seen.append(tokens.flatten().tolist())

        def end(self):
            self.ended = True

    model = model_of("llama")
    config, maps = less(model)
    ids, _ = prompts([9])
    streamer = Streamer()
    with lc.attach(model, config, maps):
        found = model.generate(ids, max_new_tokens=5, streamer=streamer, **GREEDY)
    assert streamer.ended
    assert streamer.seen == [ids[0].tolist(), *([t] for t in found[0, 9:].tolist())]


def test_returned_cache_is_a_less_cache_of_constant_size():
    model = model_of("llama")
    config, maps = less(model)
    sizes = []
    with lc.attach(model, config, maps):
        for count in (2, 20):
            out = model.generate(
                prompts([9])[0], max_new_tokens=count, return_dict_in_generate=True, **GREEDY
            )
            assert isinstance(out.past_key_values, lc.LessCache)
            sizes.append(out.past_key_values.nbytes)
    assert sizes == [config.bytes_per_sequence()] * 2


def test_embeddings_instead_of_ids():
    model = model_of("llama")
    ids, _ = prompts([9])
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(inputs_embeds=embeds, max_new_tokens=5, **GREEDY)
    with lc.attach(model, full(model)):
        found = model.generate(inputs_embeds=embeds, max_new_tokens=5, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, NotImplementedError, "prompt_lookup_num_tokens"),
        ({"penalty_alpha": 0.6, "top_k": 4}, NotImplementedError, "penalty_alpha"),
        ({"assistant_early_exit": 1}, NotImplementedError, "assistant_early_exit"),
        ({"assistant_model": "self"}, NotImplementedError, "assistant_model"),
        (
            {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
            NotImplementedError,
            "prompt_lookup_num_tokens",
        ),
        ({"cache_implementation": "static"}, ValueError, "cache_implementation: got 'static'"),
        ({"output_attentions": True}, ValueError, "output_attentions"),
        ({"use_cache": False}, ValueError, "use_cache: got False"),
        ({"past_key_values": "dynamic"}, TypeError, "got DynamicCache, expected a LessCache"),
    ],
)
def test_refused_before_anything_runs(arguments, error, message):
    model = model_of("llama")
    if arguments.get("assistant_model"):
        arguments = {"assistant_model": model}
    if arguments.get("past_key_values"):
        arguments = {"past_key_values": DynamicCache()}
    with lc.attach(model, full(model)) as handle:
        runs = []
        hook = model.register_forward_pre_hook(lambda *_: runs.append(1))
        with pytest.raises(error, match=message):
            model.generate(prompts([5])[0], max_new_tokens=3, **arguments)
        hook.remove()
        assert not runs
        assert handle.attached


def test_more_sequences_than_the_cache_holds():
    model = model_of("llama")
    ids, _ = prompts([5])
    with lc.attach(model, full(model)) as handle:
        cache = handle.new_cache(batch_size=1)
        with pytest.raises(ValueError, match="holds 1 sequences, but the input has 3"):
            model.generate(ids, num_beams=3, max_new_tokens=3, past_key_values=cache)
        cache.batch_repeat_interleave(3)
        found = model.generate(ids, num_beams=3, max_new_tokens=3, past_key_values=cache)
    assert torch.equal(found, model.generate(ids, num_beams=3, max_new_tokens=3))


def test_a_prompt_too_long_for_a_full_cache():
    model = model_of("llama")
    with lc.attach(model, full(model, capacity=8)) as handle:
        cache = handle.new_cache()
        with pytest.raises(ValueError, match=r"9 tokens in all.*capacity = 8"):
            model.generate(prompts([9])[0], max_new_tokens=3, past_key_values=cache)
        assert cache.get_seq_length() == 0
