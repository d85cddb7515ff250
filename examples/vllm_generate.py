"""vLLM with LESS: many prompts at once, each of which holds a few hundred kilobytes for good.

pip install less_cache[vllm]
python examples/vllm_generate.py
"""

from __future__ import annotations

from typing import Any

from less_cache import reference_model

PROMPTS = ["def parse_arguments(", "class Queue:\n    def ", "import json\n\n\ndef load("] * 8


def options() -> dict[str, Any]:
    """Arguments of ``vllm.LLM``; on the command line they are flags of ``vllm serve``."""
    cache = {"cache": str(reference_model.tuned("5%"))}
    return {
        "model": str(reference_model.path()),
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 256 * 2**20,
        "max_num_seqs": 32,
        "attention_backend": "CUSTOM",
        "additional_config": {"less_cache": cache},
    }


def main() -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(**options())
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    print(f"Memory for {blocks - 1} requests, however long they are")
    answers = llm.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0))
    # All come at once; those to the same prompt are the same.
    for answer in answers[: len(set(PROMPTS))]:
        print(repr(answer.prompt + answer.outputs[0].text))


if __name__ == "__main__":
    main()
