"""lm-evaluation-harness with the model less-cache: what it answers is what decoding would."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import less_cache as lc
from less_cache import cli, reference_model
from less_cache.integrations.introspection import description
from tests.integrations.models import build, less, model_of
from tests.integrations.test_scoring import decoded, numbers_tokenizer

# Nothing here needs the hub; what lm_eval asks it all the same fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
try:
    evaluator = importlib.import_module("lm_eval.evaluator")
    ours = importlib.import_module("less_cache.integrations.lm_eval")
except ImportError:
    evaluator = ours = None

needs_lm_eval = pytest.mark.skipif(ours is None, reason="needs less_cache[lm-eval]")
ROOT = Path(__file__).parents[2]
TASKS = Path(__file__).parent / "lm_eval_tasks"
CLOSE = {"atol": 2e-4, "rtol": 2e-4}

REQUESTS = [
    # Three that share a prompt, and differ in length; one of them a single token.
    ([5, 9, 7, 33, 12, 60, 41, 8, 3, 71], [4]),
    ([5, 9, 7, 33, 12, 60, 41, 8, 3, 71], [50, 6, 13]),
    ([5, 9, 7, 33, 12, 60, 41, 8, 3, 71], [50, 7]),
    # Two that share another one.
    ([8, 30, 31, 12, 90, 14, 44, 6], [9, 2]),
    ([8, 30, 31, 12, 90, 14, 44, 6], [61]),
    # Two that share too little for a cache to pay, and two alone.
    ([1], [22, 8, 90, 31, 7, 15, 33, 2]),
    ([1], [3, 8, 14, 25]),
    ([11, 3], [22, 8, 90, 31, 7, 15]),
    ([11, 3, 17, 21, 9, 40, 33, 34, 35, 36, 37], [22, 8, 90, 31, 7, 15]),
]


def judge_of(model, config, maps, **more):
    return ours.LessCacheLM(
        model,
        tokenizer=numbers_tokenizer(),
        capacity=config.capacity,
        policy=config.policies[0],
        maps=maps,
        **more,
    )


def one_by_one(model, config, maps, requests):
    """The answers of a decoder that takes one token a pass, and no two requests together."""
    answers = []
    with lc.attach(model, config, maps) as handle:
        for context, more in requests:
            text = torch.tensor([[*context, *more]])
            logits = decoded(model, text[:, :-1], torch.ones_like(text), handle.new_cache())
            own = logits[0, -len(more) :]
            picked = own.log_softmax(1).gather(1, text[0, -len(more) :, None])
            answers.append((float(picked.sum()), own.argmax(1).tolist() == more))
    return answers


@needs_lm_eval
@pytest.mark.parametrize("size", [1, 3, 16, "auto"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_new"])
def test_answers_are_those_of_decoding(family, size):
    model = model_of(family)
    config, maps = less(model)
    expected = one_by_one(model, config, maps, REQUESTS)
    # The likeliest token, so that some answer is greedy.
    with lc.attach(model, config, maps) as handle:
        text = torch.tensor([REQUESTS[0][0]])
        best = decoded(model, text, torch.ones_like(text), handle.new_cache())[0, -1].argmax()
    asked = [*REQUESTS, (REQUESTS[0][0], [int(best)])]
    judge = judge_of(model, config, maps, batch_size=size)
    try:
        found = judge._loglikelihood_tokens(
            [(("", ""), *request) for request in asked], disable_tqdm=True
        )
    finally:
        judge.attachment.detach()
    scores = torch.tensor([score for score, _ in found])
    torch.testing.assert_close(scores[:-1], torch.tensor([s for s, _ in expected]), **CLOSE)
    assert [greedy for _, greedy in found] == [*(greedy for _, greedy in expected), True]


@needs_lm_eval
def test_a_shared_prompt_is_read_once(monkeypatch):
    model = model_of("llama")
    config, maps = less(model)
    judge = judge_of(model, config, maps, batch_size=4)
    fed = []
    forward = judge._forward
    monkeypatch.setattr(
        judge, "_forward", lambda ids, mask, **more: fed.append(ids) or forward(ids, mask, **more)
    )
    try:
        judge._loglikelihood_tokens([(None, *r) for r in REQUESTS[:5]], disable_tqdm=True)
    finally:
        judge.attachment.detach()
    # Both prompts together, and then what continues them: at most two tokens each.
    assert fed[0].shape == (2, 10)
    assert all(ids.shape[1] <= 2 for ids in fed[1:])


@needs_lm_eval
def test_what_is_too_long_loses_its_beginning():
    model = model_of("llama")
    config, maps = less(model)
    judge = judge_of(model, config, maps, max_length=12)
    context, choices = [*range(20, 40)], [[7, 8], [9, 10, 11]]
    # Each continuation leaves another part of the prompt, so that nothing is shared.
    kept = [(context[-(13 - len(more)) :], more) for more in choices]
    try:
        found = judge._loglikelihood_tokens([(None, context, x) for x in choices])
        with pytest.raises(ValueError, match="at most 12 to score"):
            judge._loglikelihood_tokens([(None, context, [*range(3, 16)])])
    finally:
        judge.attachment.detach()
    expected = one_by_one(model, config, maps, kept)
    torch.testing.assert_close(
        torch.tensor([s for s, _ in found]), torch.tensor([s for s, _ in expected]), **CLOSE
    )


@needs_lm_eval
def test_rolling_and_generation_are_those_of_decoding():
    instance = importlib.import_module("lm_eval.api.instance").Instance
    model = build("llama")
    config, maps = less(model)
    tokenizer = numbers_tokenizer()
    tokenizer.eos_token = "0"  # Which lm_eval takes for the end of what is written.
    texts = [" ".join(str(3 + 7 * i % 90) for i in range(n)) for n in (40, 9, 23)]
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    whole = [tokenizer(text).input_ids for text in texts]
    expected, lines = [], []
    for ids in whole:
        # Windows of 16 tokens; the last one is as full as the text allows.
        starts = [*range(0, len(ids), 16)]
        total = 0.0
        for start in starts:
            more = ids[start : start + 16]
            before = 1 if start == 0 else ids[start - 1]
            first = max(0, start + len(more) - 16) if start else 0
            context = [before] if first in (0, start) else ids[first - 1 : start]
            ((score, _),) = one_by_one(model, config, maps, [(context, more)])
            total += score
        expected.append(total)
        with lc.attach(model, config, maps) as handle:
            cache, new = handle.new_cache(), []
            tail = torch.tensor([ids[-10:]])
            logits = decoded(model, tail, torch.ones_like(tail), cache)
            for _ in range(6):
                new.append(logits[:, -1:].argmax(2))
                logits = model(new[-1], past_key_values=cache).logits
        lines.append(tokenizer.decode(torch.cat(new, 1)[0]).strip())
    more = {"max_length": 16, "batch_size": 3, "prefix_token_id": 1}
    judge = ours.LessCacheLM(
        model, tokenizer=tokenizer, capacity=6, policy=config.policies[0], maps=maps, **more
    )
    model.generation_config.eos_token_id = None
    try:
        asked = [instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
        found = judge.loglikelihood_rolling(asked, disable_tqdm=True)
        asked = [
            instance("generate_until", {}, (text, settings), i) for i, text in enumerate(texts)
        ]
        written = judge.generate_until(asked, disable_tqdm=True)
    finally:
        judge.attachment.detach()
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **CLOSE)
    # At lm_eval's own end of a text it cuts.
    assert [line.strip() for line in written] == [line.split("0")[0].strip() for line in lines]
    assert any(len(line.split()) == 6 for line in written)


@needs_lm_eval
def test_a_whole_cache_stands_for_its_parts(tmp_path):
    model = model_of("llama")
    config, maps = less(model, capacity=[[6, 9], 7])
    config = config.replace(quantization=lc.Quantization(4, 4), policy=[lc.H2O(), lc.TOVA()])
    made = lc.CacheRecipe(config, maps, model=description(model.config))
    made.save_pretrained(tmp_path)
    with lc.attach(model, made) as handle:
        for context, more in REQUESTS[:1]:
            text = torch.tensor([[*context, *more]])
            logits = decoded(model, text[:, :-1], torch.ones_like(text), handle.new_cache())
    wanted = float(logits[0, -1].log_softmax(0)[more[0]])
    for given in (made, tmp_path, str(tmp_path)):
        judge = ours.LessCacheLM(model, tokenizer=numbers_tokenizer(), cache=given)
        try:
            assert judge.attachment.manager.config == config
            ((found, _),) = judge._loglikelihood_tokens([(None, context, more)])
            assert found == pytest.approx(wanted, abs=2e-4)
            assert judge.get_model_info()["cache_maps"] == maps.digest
        finally:
            judge.attachment.detach()


@needs_lm_eval
def test_a_whole_cache_is_given_alone_and_for_its_model(tmp_path):
    model = model_of("llama")
    config, maps = less(model)
    made = lc.CacheRecipe(config, maps, model=description(model.config))
    for name, value in {"capacity": 8, "policy": "h2o", "maps": maps}.items():
        with pytest.raises(ValueError, match=f"^{name}: given beside cache="):
            ours.LessCacheLM(model, tokenizer=numbers_tokenizer(), cache=made, **{name: value})
    with pytest.raises(ValueError, match=r"^capacity: got None; expected capacity=, or cache="):
        ours.LessCacheLM(model, tokenizer=numbers_tokenizer())
    with pytest.raises(ValueError, match=r"made for a model of .*model_type = 'llama'"):
        ours.LessCacheLM(model_of("qwen2"), tokenizer=numbers_tokenizer(), cache=made)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ours.LessCacheLM(model, tokenizer=numbers_tokenizer(), cache=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="budget: got '77%'"):
        ours.LessCacheLM(model, tokenizer=numbers_tokenizer(), cache="reference:77%")


@needs_lm_eval
def test_local_tasks_on_the_shipped_model(monkeypatch, tmp_path):
    """By the command, and once more from Python one request at a time with another backend."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = [f"less_cache_{name}" for name in ("choices", "last", "rolling", "lines")]
    maps = "less_cache/reference_model/maps/h2o-5/end-to-end"
    arguments = ["lm-eval", "run", "--model", "less-cache", "--include_path", str(TASKS)]
    arguments += ["--tasks", *names, "--batch_size", "4", "--device", "cpu", "--model_args"]
    arguments += [f"pretrained=reference,capacity=52,policy=h2o,maps={maps},dtype=float32"]
    arguments += ["--output_path", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (written,) = (tmp_path / "out").rglob("results*.json")
    told = json.loads(written.read_text())
    assert told["config"]["cache"].startswith("CacheConfig(")
    assert told["config"]["cache_maps"]
    model, tokenizer = reference_model.load()
    judge = ours.LessCacheLM(
        model, tokenizer=tokenizer, capacity=52, policy=lc.H2O(), maps=maps, cache_backend="torch"
    )
    tasks = importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(TASKS))
    try:
        alone = evaluator.simple_evaluate(judge, tasks=names, task_manager=tasks, bootstrap_iters=0)
    finally:
        judge.attachment.detach()
    whole = evaluator.simple_evaluate(
        "hf",
        model_args={"pretrained": str(reference_model.path()), "dtype": "float32"},
        device="cpu",
        tasks=names,
        task_manager=tasks,
        bootstrap_iters=0,
    )
    for name in names:
        for metric, value in told["results"][name].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert alone["results"][name][metric] == pytest.approx(value, rel=1e-3), metric
    rolling = "less_cache_rolling", "word_perplexity,none"
    assert told["results"][rolling[0]][rolling[1]] > whole["results"][rolling[0]][rolling[1]]


@needs_lm_eval
def test_maps_for_another_policy_are_warned_of(caplog):
    model, tokenizer = reference_model.load()
    maps = str(ROOT / "less_cache/reference_model/maps/h2o-5/end-to-end")
    judge = ours.LessCacheLM(model, tokenizer=tokenizer, capacity=52, maps=maps)
    judge.attachment.detach()
    assert "maps: trained for H2O" in caplog.text


@needs_lm_eval
def test_arguments_that_fit_nothing_are_refused():
    model = model_of("llama")
    tokenizer = numbers_tokenizer()
    with pytest.raises(ValueError, match="policy: got 'nothing'"):
        ours.LessCacheLM(model, tokenizer=tokenizer, capacity=8, policy="nothing")
    with pytest.raises(ValueError, match="capacity"):
        ours.LessCacheLM(model, tokenizer=tokenizer, capacity=0)
    with pytest.raises(FileNotFoundError):
        ours.LessCacheLM(model, tokenizer=tokenizer, capacity=8, maps="nowhere/at-all")
    judge = ours.LessCacheLM(
        model, tokenizer=tokenizer, capacity=8, policy="sinkwindow:sinks=1+recent=3"
    )
    judge.attachment.detach()
    assert judge.attachment.manager.config.policies[0] == lc.SinkWindow(sinks=1, recent=3)


@pytest.mark.skipif(ours is not None, reason="lm_eval is here")
def test_without_lm_eval_its_extra_is_named():
    result = CliRunner().invoke(cli.app, ["lm-eval", "--help"])
    assert isinstance(result.exception, ImportError)
    assert "install less_cache[lm-eval]" in str(result.exception)
