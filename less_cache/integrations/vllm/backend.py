"""The attention backend: vLLM's layers attend by the step over pages that vLLM owns."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from .attention import LessAttention
from .spec import page_spec

MADE = "_less_cache_metadata"
"""Where a batch keeps what was made of it."""


class LessBackend(AttentionBackend):
    """What vLLM asks of a backend; one subclass for each size of a page (`for_page`)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = True
    page: ClassVar[tuple[int, int] | None] = None
    """Bytes of a page, and the longest request."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LessAttention]:
        return LessAttention

    @staticmethod
    def get_builder_cls() -> type[LessMetadataBuilder]:
        return LessMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        # One group of layers, whatever their pages are.
        return (LessBackend.__module__, LessBackend.__qualname__)

    @staticmethod
    @functools.cache
    def for_page(nbytes: int, max_model_len: int) -> type[LessBackend]:
        """The backend of layers whose pages have so many bytes."""
        return type("LessBackend", (LessBackend,), {"page": (nbytes, max_model_len)})

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        if cls.page is None:
            raise RuntimeError("less_cache: asked for the pages of layers that are not loaded")
        return page_spec(spec, *cls.page)


@dataclass
class LessMetadata(AttentionMetadata):
    """A batch: first the requests with one new token, then those with several.

    Attributes
    ----------
    num_tokens : int
        Without padding behind them.
    decodes : int
        Requests with one new token, or none, each of which has a place in the batch.
    lengths : Tensor
        [B] int32, tokens that each request has taken in.
    rows : Tensor
        [B] int32, its page.
    query_start_loc : Tensor
        [prefills + 1] int32, where the tokens of the others begin, counted from the first of them.
    max_query_len : int
        The most of any request.
    """

    num_tokens: int
    decodes: int
    lengths: Tensor
    rows: Tensor
    query_start_loc: Tensor
    max_query_len: int


class LessMetadataBuilder(AttentionMetadataBuilder[LessMetadata]):
    """Makes a step's metadata, once for all groups of layers.

    Lengths and rows lie where they always did, so that a CUDA graph that was captured reads the
    new ones; nothing is read back.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        most = vllm_config.scheduler_config.max_num_seqs
        sizes = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
        self._lengths = torch.zeros(max(most, *sizes, 1), dtype=torch.int32, device=device)
        self._rows = torch.zeros_like(self._lengths)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LessMetadata:
        common = common_attn_metadata
        # Layers with pages of another size are another group, with a builder of its own.
        made, of = getattr(common, MADE, (None, None))
        if made is not None and of is common.block_table_tensor:
            return made
        count = common.num_reqs
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(common)
        lengths, rows = self._lengths[:count], self._rows[:count]
        lengths.copy_(common.compute_num_computed_tokens()[:count])
        rows.copy_(common.block_table_tensor[:count, 0])
        first = common.query_start_loc[decodes : count + 1]
        if prefills:
            first = first - decode_tokens
        made = LessMetadata(
            common.num_actual_tokens, decodes, lengths, rows, first, common.max_query_len
        )
        setattr(common, MADE, (made, common.block_table_tensor))
        return made
