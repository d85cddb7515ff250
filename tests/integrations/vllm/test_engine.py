"""Answers do not depend on what else the engine does, nor on what its memory held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import less_cache as lc
from less_cache import reference_model
from less_cache.integrations.introspection import description
from tests.integrations.vllm.engines import (
    CACHE,
    answers,
    config_of,
    engine,
    expected,
    options,
    prompts_of,
)

pytest.importorskip("vllm", reason="needs vLLM: make vllm sets up an environment with it")

ROOT = Path(__file__).parents[3]
LENGTHS = (1, 60, 128, 200, 300, 450, 520, 700)


@pytest.fixture(scope="module")
def prompts():
    return prompts_of(LENGTHS)


@pytest.fixture(scope="module")
def wanted(prompts):
    return expected(prompts, 16, chunk=128)


CHUNKED = {**CACHE, "prompt_chunk": 128}


@pytest.mark.parametrize("budget", [135, 200, 1000])
def test_answers_do_not_depend_on_a_steps_budget(prompts, wanted, budget):
    with engine(CHUNKED, max_num_seqs=8, max_num_batched_tokens=budget) as llm:
        assert answers(llm, prompts, 16) == wanted


def pools(llm):
    """Every layer's memory."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer.kv_cache for layer in layers.values()]


def test_a_tuned_folder(prompts, wanted, tmp_path):
    model, _ = reference_model.load()
    maps = lc.FeatureMaps.from_pretrained(CACHE["maps"])
    recipe = lc.CacheRecipe(config_of(model, CACHE), maps, model=description(model.config))
    recipe.save_pretrained(tmp_path)
    with engine({"cache": str(tmp_path), "prompt_chunk": 128}, max_num_seqs=8) as llm:
        assert answers(llm, prompts, 16) == wanted


def test_what_memory_held_makes_no_difference(prompts, wanted):
    with engine(CHUNKED, num_gpu_blocks_override=6, enable_prefix_caching=True) as llm:
        assert not llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        for pool in pools(llm):
            # All ones: not a number in any width.
            pool.fill_(-1)
        # More requests than there are pages.
        assert answers(llm, prompts, 16) == wanted
        for pool in pools(llm):
            pool.fill_(127)
        assert answers(llm, prompts, 16) == wanted


def test_each_layer_takes_the_bytes_it_needs():
    capacities = [40, 64, [30, 60, 40, 50], 52, 48, 52]
    with engine({**CACHE, "capacity": capacities}, num_gpu_blocks_override=6) as llm:
        sizes = [pool.shape for pool in pools(llm)]
    slots = [sum(c) if isinstance(c, list) else 4 * c for c in capacities]
    # Keys and values, scores and positions of every slot; H and z of every head.
    needed = [n * (2 * 64 * 4 + 8) + 4 * 8 * 65 * 4 for n in slots]
    assert [tuple(shape) for shape in sizes] == [(6, 1, 1, n) for n in needed]


def test_preempted_requests_come_to_the_same_answers(prompts, wanted):
    from vllm import SamplingParams

    with engine(CHUNKED) as llm:
        core = llm.llm_engine
        parameters = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            core.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
        found, steps, preempted = {}, 0, 0
        scheduler = core.engine_core.engine_core.scheduler
        while core.has_unfinished_requests():
            for request in core.step():
                if request.finished:
                    found[int(request.request_id)] = list(request.outputs[0].token_ids)
            steps += 1
            if steps % 9 == 0 and preempted < 15:
                preempted += len(scheduler.running)
                assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert preempted >= 15
    assert [found[number] for number in range(len(prompts))] == wanted


def test_compiled_by_inductor(prompts, wanted):
    with engine(CHUNKED, enforce_eager=False) as llm:
        assert answers(llm, prompts, 16) == wanted


TWO = """
import json, sys
from vllm import LLM
from tests.integrations.vllm.engines import answers
if __name__ == "__main__":
    options, prompts = json.load(sys.stdin)
    llm = LLM(**options)
    print("ANSWERS", json.dumps(answers(llm, prompts, 16)))
"""


def test_two_processes_share_the_heads(prompts, wanted, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
    # Two ranks of one core each, on whatever machine this is.
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    given = json.dumps([options(CHUNKED, tensor_parallel_size=2), prompts])
    done = subprocess.run(
        [sys.executable, str(script)],
        input=given,
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=250,
        check=False,
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert told, done.stderr[-4000:]
    assert json.loads(told[0].removeprefix("ANSWERS")) == wanted
