"""One page a request: what vLLM's memory planning is told of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.kv_cache_interface import CircularBufferSpec

ROUND = 128
"""A block's tokens are a multiple of it: what other layers' blocks divide."""


@dataclass(frozen=True, kw_only=True)
class PageSpec(CircularBufferSpec):
    """One block a request for its whole life, of bytes that only less_cache reads.

    vLLM's circular buffers have what it takes: no prefix caching, no slot of each token, and one
    block however many tokens there are.
    """


def page_spec(spec: Any, nbytes: int, max_model_len: int) -> PageSpec:
    """The spec of a layer whose page has so many bytes.

    Parameters
    ----------
    spec
        vLLM's own, of full attention.
    nbytes
        From ``CacheConfig.page``.
    max_model_len
        No request is longer.
    """
    tokens = -(-max_model_len // ROUND) * ROUND
    return PageSpec(
        block_size=tokens,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=torch.int8,
        dcp_sharded=False,
        num_head_slots=1,
        tokens_per_state=tokens,
        state_content_bytes=nbytes,
    )
