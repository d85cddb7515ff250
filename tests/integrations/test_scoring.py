"""`attach(scoring=True)`: one pass over a text says what decoding it token by token would."""

import contextlib
import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TextGenerationPipeline

import less_cache as lc
from tests.integrations.lm_eval_like import loglikelihoods
from tests.integrations.models import FAMILIES, build, full, less, model_of, positions, prompts
from tests.policies import MostSeen, MostSeenOneByOne

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"do_sample": False, "eos_token_id": None}
LENGTHS = [17, 9, 13]


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error", lc.FullAttentionWarning)
        yield


@torch.no_grad()
def decoded(model, ids, mask, cache, *, seen=0):
    """Logits of one pass a token: what a decoder says that evicts at each."""
    place = positions(mask)
    return torch.cat(
        [
            model(
                ids[:, i : i + 1],
                attention_mask=mask[:, : seen + i + 1],
                position_ids=place[:, seen + i : seen + i + 1],
                past_key_values=cache,
            ).logits
            for i in range(ids.shape[1])
        ],
        1,
    )


def by_head(model, policy=None, rank=4):
    """A config whose heads differ in capacity, where there are several."""
    config, _ = less(model, policy=policy, rank=4)
    if config.kv_heads > 1:
        slots = [6, 8, 6, 7][: config.kv_heads]
        config = config.replace(capacity=[slots] * config.num_layers)
    maps = lc.FeatureMaps.initialise(config, kind="exp", hidden=8)
    return (config, maps) if rank else (config.replace(rank=0), None)


def assert_same_states(found, wanted):
    for one, other in zip(found.state.layers, wanted.state.layers, strict=True):
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.length, other.length)
        for name in ("keys", "values", "scores", "H", "z"):
            # A sum of what evicted keys' exponentials weigh carries their rounding along.
            close = {"atol": 1e-3, "rtol": 1e-3} if name in ("H", "z") else CLOSE
            torch.testing.assert_close(getattr(one, name), getattr(other, name), **close)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_equals_decoding(family, side):
    model = model_of(family)
    config, maps = by_head(model)
    ids, mask = prompts(LENGTHS, side=side)
    inputs = {"attention_mask": mask, "position_ids": positions(mask)}
    with lc.attach(model, config, maps) as handle:
        cache = handle.new_cache()
        expected = decoded(model, ids, mask, cache)
    real = mask.bool()
    whole = model(ids, **inputs).logits
    assert (whole[real] - expected[real]).abs().max() > 0.1, "a small cache must be felt"
    with quiet(), lc.attach(model, config, maps, scoring=True) as handle:
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                mine = handle.new_cache()
                out = model(ids, past_key_values=mine, **inputs)
                assert out.past_key_values is mine
                torch.testing.assert_close(out.logits[real], expected[real], **CLOSE)
                assert_same_states(mine, cache)
                assert mine.get_seq_length() == cache.get_seq_length()
                alone = model(ids, use_cache=False, **inputs)
                assert alone.past_key_values is None
                torch.testing.assert_close(alone.logits[real], expected[real], **CLOSE)


POLICIES = [
    lc.SinkWindow(sinks=1),
    lc.H2O(),
    lc.TOVA(),
    lc.Scissorhands(window=5),
    lc.KeyNorm(sinks=1, recent=2),
    lc.DecayedH2O(factor=0.9),
    lc.ObservationWindow(window=4, neighbours=3),
    MostSeen(),
    MostSeenOneByOne(),
]


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_every_policy(policy, rank):
    model = model_of("llama")
    config, maps = by_head(model, policy, rank)
    _, mask = prompts(LENGTHS)
    # No token twice: equal norms of keys would be told apart by rounding alone.
    draws = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(94, generator=draws)[:17] + 3 for _ in LENGTHS])
    inputs = {"attention_mask": mask, "position_ids": positions(mask)}
    with lc.attach(model, config, maps) as handle:
        expected = decoded(model, ids, mask, handle.new_cache())
    real = mask.bool()
    with lc.attach(model, config, maps, scoring=True):
        for settings in ({}, {"use_cache": False}):
            found = model(ids, **inputs, **settings).logits
            torch.testing.assert_close(found[real], expected[real], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_mqa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pass_goes_on_from_a_cache_and_later_ones_from_it(family, side):
    model = model_of(family)
    config, maps = less(model)
    ids, mask = prompts(LENGTHS, side=side)
    more, _ = prompts([3] * 3, seed=8)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    place = positions(mask)
    with lc.attach(model, config, maps) as handle:
        cache = handle.new_cache()
        expected = decoded(model, ids, mask, cache)
    with lc.attach(model, config, maps, scoring=True) as handle:
        for grad in (False, True):
            mine, found = handle.new_cache(), []
            with torch.set_grad_enabled(grad):
                for start, stop in [(0, 5), (5, 6), (6, 17), (17, 20)]:
                    out = model(
                        ids[:, start:stop],
                        attention_mask=mask[:, :stop],
                        position_ids=place[:, start:stop],
                        past_key_values=mine,
                    )
                    found.append(out.logits)
            real = mask.bool()
            torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], **CLOSE)
            assert_same_states(mine, cache)


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_new"])
def test_generation_goes_on_from_a_scored_text(family):
    model = model_of(family)
    config, maps = less(model)
    ids, mask = prompts([17, 17])
    settings = {"max_new_tokens": 6, **GREEDY}
    with lc.attach(model, config, maps) as handle:
        cache = handle.new_cache()
        decoded(model, ids[:, :16], mask[:, :16], cache)
        expected = model.generate(ids, past_key_values=cache, **settings)
    with quiet(), lc.attach(model, config, maps, scoring=True) as handle:
        cache = handle.new_cache()
        model(ids[:, :16], past_key_values=cache)
        assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)
        # The prompt of generate() is fed token by token as well.
        assert torch.equal(model.generate(ids, **settings), expected)


def test_the_loss_is_that_of_decoding_and_so_are_its_gradients():
    model = build("llama")
    config, maps = less(model)
    ids, mask = prompts([17, 17])
    with lc.attach(model, config, maps) as handle:
        logits = decoded(model, ids, mask, handle.new_cache())
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradients = []
    with quiet(), lc.attach(model, config, maps, scoring=True):
        for settings in ({}, {"use_cache": False}):
            model.zero_grad()
            loss = model(ids, labels=ids, **settings).loss
            torch.testing.assert_close(loss, expected, **CLOSE)
            loss.backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)
    # In the direction of the gradient the loss changes by its square norm.
    norm = sum(g.square().sum() for g in gradients[0].values())
    losses = []
    with torch.no_grad(), lc.attach(model, config, maps, scoring=True):
        for step in (1e-4, -2e-4):
            for name, parameter in model.named_parameters():
                parameter.add_(gradients[0][name], alpha=step)
            losses.append(model(ids, labels=ids).loss)
    slope = (losses[0] - losses[1]) / 2e-4
    torch.testing.assert_close(slope, norm, rtol=0.05, atol=0)


def test_gradients_of_the_inputs():
    model = model_of("llama")
    config, maps = less(model)
    ids, _ = prompts([17])
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    with lc.attach(model, config, maps, scoring=True):
        model(inputs_embeds=embeds).logits[:, -1].sum().backward()
    assert (embeds.grad.abs().sum(2) > 0).all(), "the last token remembers the first"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon_new"])
def test_gradient_checkpointing(family, reentrant):
    model = build(family)
    config, maps = less(model)
    ids, _ = prompts([17, 17])
    with lc.attach(model, config, maps, scoring=True) as handle:
        model(ids, labels=ids).loss.backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], **CLOSE)
        with pytest.raises(ValueError, match="leave out past_key_values"):
            model(ids, past_key_values=handle.new_cache())
    with lc.attach(model, config, maps):
        with pytest.raises(ValueError, match=r"gradient checkpointing without a cache.*scoring"):
            model(ids)
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.gradient_checkpointing_disable()
        model(ids)


@pytest.mark.parametrize("mixed", [None, torch.bfloat16])
def test_scores_as_lm_eval_takes_them(mixed):
    model = model_of("llama")
    config, maps = less(model)
    draws = torch.Generator().manual_seed(4)
    requests = [
        tuple(torch.randint(3, 97, (n,), generator=draws).tolist() for n in sizes)
        for sizes in [(12, 4), (3, 2), (9, 9), (1, 14)]
    ]
    whole = loglikelihoods(model, requests, batch=2, mixed=mixed)
    expected = []
    with lc.attach(model, config, maps) as handle:
        for context, continuation in requests:
            text = torch.tensor([context + continuation])
            mask = torch.ones_like(text)
            logits = decoded(model, text[:, :-1], mask, handle.new_cache())
            chosen = logits.log_softmax(2)[0, -len(continuation) :]
            expected.append(chosen.gather(1, text[0, -len(continuation) :, None]).sum().item())
        with pytest.warns(lc.FullAttentionWarning):
            fooled = loglikelihoods(model, requests, batch=2, mixed=mixed)
    torch.testing.assert_close(torch.tensor(fooled), torch.tensor(whole), atol=0.5, rtol=0.02)
    with quiet(), lc.attach(model, config, maps, scoring=True):
        found = loglikelihoods(model, requests, batch=2, mixed=mixed)
    close = CLOSE if mixed is None else {"atol": 1.5, "rtol": 0.05}
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **close)
    assert abs(sum(found) - sum(whole)) > 1


def test_lm_eval_itself():
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    model = build("llama")
    config, maps = less(model)
    requests = [([5, 9, 7, 33, 12, 60, 41, 8, 3], [4, 50, 6]), ([11, 3], [22, 8, 90, 31, 7, 15])]
    with lc.attach(model, config, maps, scoring=True):
        expected = loglikelihoods(model, requests, batch=1)
        judge = huggingface.HFLM(pretrained=model, tokenizer=numbers_tokenizer(), batch_size=1)
        asked = [(("", ""), *request) for request in requests]
        found = [score for score, _ in judge._loglikelihood_tokens(asked, disable_tqdm=True)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **CLOSE)


def test_the_pipeline():
    tokenizer = numbers_tokenizer()
    model = build("llama")
    config, maps = less(model)
    text = " ".join(str(n) for n in range(10, 27))
    settings = {"max_new_tokens": 5, "return_full_text": False, **GREEDY}
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with lc.attach(model, config, maps) as handle:
        cache = handle.new_cache()
        logits = decoded(model, ids, torch.ones(1, 99, dtype=torch.long), cache)
        tokens = []
        for _ in range(5):
            tokens.append(logits[:, -1:].argmax(2))
            logits = model(tokens[-1], past_key_values=cache).logits
    expected = tokenizer.decode(torch.cat(tokens, 1)[0])
    with quiet(), lc.attach(model, config, maps, scoring=True):
        pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer)
        assert pipe(text, **settings)[0]["generated_text"].strip() == expected.strip()
    with quiet(), lc.attach(model, config, maps):
        pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer)
        assert pipe(text, **settings)[0]["generated_text"].strip() != expected.strip()


def numbers_tokenizer():
    words = models.WordLevel({str(i): i for i in range(97)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", unk_token="0")


@torch.no_grad()
def test_whoever_would_be_fooled_is_told_once():
    model = model_of("llama")
    config, maps = less(model)
    ids, mask = prompts([17, 6])
    calls = {
        "logits": lambda: model(ids),
        "loss": lambda: model(ids, labels=ids),
        "several": lambda: model(ids, logits_to_keep=2),
        "padded": lambda: model(ids, attention_mask=mask),
        "by hand": lambda: model.lm_head(model.model(ids).last_hidden_state),
        "no cache": lambda: model(ids, use_cache=False),
    }
    for name, call in calls.items():
        with lc.attach(model, config, maps):
            with pytest.warns(lc.FullAttentionWarning, match="scoring=True") as caught:
                call()
            assert len(caught) == 1, name
            with quiet():
                call()
    assert issubclass(lc.FullAttentionWarning, UserWarning)


@torch.no_grad()
def test_nobody_else_is():
    model = model_of("llama")
    config, maps = less(model)
    ids, mask = prompts([17, 6])
    with quiet(), lc.attach(model, config, maps) as handle:
        model.generate(ids, attention_mask=mask, max_new_tokens=4)
        model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2)
        model(ids, logits_to_keep=1)
        model.model(ids)
        # Six tokens fit, whatever the padding.
        model(ids[1:], attention_mask=mask[1:])
        cache = handle.new_cache()
        for i in range(9):
            model(ids[:, i : i + 1], past_key_values=cache)
    with quiet(), lc.attach(model, full(model)):
        model(ids, labels=ids)
    with quiet(), lc.attach(model, config, maps, scoring=True):
        model(ids, labels=ids)
        model(ids, use_cache=False)


def test_generate_of_a_model_that_gives_all_logits_does_not_warn():
    class Wordy(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **given):
            given.pop("logits_to_keep", None)
            return super().forward(
                input_ids, attention_mask, past_key_values=past_key_values, **given
            )

    model = Wordy(model_of("llama").config).eval()
    config, maps = less(model)
    ids, _ = prompts([17])
    with lc.attach(model, config, maps):
        with quiet():
            model.generate(ids, max_new_tokens=4, pad_token_id=0)
        with pytest.warns(lc.FullAttentionWarning):
            model(ids)


def test_what_is_asked_for_must_be_true_or_false():
    model = model_of("llama")
    with pytest.raises(TypeError, match="scoring: got 1"):
        lc.attach(model, full(model), scoring=1)


def test_a_mask_that_does_not_fit():
    model = model_of("llama")
    config, maps = less(model)
    ids, mask = prompts([17, 6])
    with (
        lc.attach(model, config, maps, scoring=True),
        pytest.raises(ValueError, match=r"attention_mask: .*\(2, 17\)"),
    ):
        model(ids, attention_mask=mask[:, 1:], use_cache=False)


def test_a_model_that_says_it_keeps_no_cache_is_scored_all_the_same():
    model = build("llama", use_cache=False)
    config, maps = less(model)
    ids, mask = prompts([17, 17])
    with lc.attach(model, config, maps) as handle:
        expected = decoded(model, ids, mask, handle.new_cache())
    with torch.no_grad(), lc.attach(model, config, maps, scoring=True):
        out = model(ids)
    assert out.past_key_values is None
    torch.testing.assert_close(out.logits, expected, **CLOSE)
