"""The schedulers: prompts in fixed chunks, so that an answer does not depend on the load.

What a pass of several tokens leaves in the cache depends on where the pass ends. vLLM ends it
where a step's budget does, which other requests share; these end it at multiples of
``prompt_chunk``, or at the prompt's end, and otherwise let the request wait. Tokens that were
generated before a preemption are taken in again one by one, as they were the first time.

vLLM has such a rule for models with a state, whose switch and method are overridden here.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from .chunks import chunk_of
from .settings import NAME, Settings


class Chunks(Scheduler):
    """vLLM's scheduler, but for the chunks."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        options: Any = self.vllm_config.additional_config
        self.prompt_chunk = Settings.from_dict(options[NAME]).prompt_chunk
        self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        start = (
            request.num_computed_tokens
            + num_new_local_computed_tokens
            + num_external_computed_tokens
        )
        return chunk_of(start, num_new_tokens, request.num_prompt_tokens, self.prompt_chunk)


class AsyncChunks(Chunks, AsyncScheduler):
    """The same where steps are scheduled ahead."""
