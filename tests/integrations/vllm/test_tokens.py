"""vLLM with the plugin answers what `attach` and transformers do, token for token."""

from __future__ import annotations

import pytest
import torch

from less_cache import reference_model
from tests.integrations.vllm.engines import CACHE, answers, engine, expected, prompts_of

pytest.importorskip("vllm", reason="needs vLLM: make vllm sets up an environment with it")

LENGTHS = (1, 2, 51, 52, 53, 54, 127, 128, 129, 333, 512, 640, 701, 900)


@pytest.mark.parametrize("chunk", [1024, 128], ids=["whole", "chunked"])
def test_mixed_prompts_are_answered_as_by_attach(chunk):
    prompts = prompts_of(LENGTHS)
    with engine({**CACHE, "prompt_chunk": chunk}) as llm:
        found = answers(llm, prompts, 24)
        # Pages that others used, and prompts that were seen: nothing of it is left over.
        again = answers(llm, prompts[::-1], 24)
    assert found == expected(prompts, 24, chunk=chunk)
    assert again == found[::-1]


@pytest.mark.parametrize(
    "less",
    [
        {"capacity": 48, "policy": "sinkwindow:sinks=4"},
        {"capacity": [40, 64, [30, 60, 40, 50], 52, 48, [20, 64, 64, 20]], "policy": "h2o"},
        {**CACHE, "bits": 4},
        {**CACHE, "capacity": [40, 64, [30, 60, 40, 50], 52, 48, 52], "bits": 3},
    ],
    ids=["policy alone", "by head", "coded", "coded by head"],
)
def test_caches_of_all_kinds(less):
    prompts = prompts_of((3, 200, 450))
    with engine({**less, "prompt_chunk": 128}, max_num_seqs=4) as llm:
        found = answers(llm, prompts, 16)
    assert found == expected(prompts, 16, chunk=128, less=less)


def test_bfloat16():
    prompts = prompts_of((1, 60, 400))
    model, _ = reference_model.load(torch.bfloat16)
    with engine(dtype="bfloat16", max_num_seqs=4) as llm:
        found = answers(llm, prompts, 12)
    assert found == expected(prompts, 12, model=model)
