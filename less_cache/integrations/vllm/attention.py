"""What a layer computes: the step, over the pages that vLLM gave it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from ...arrays import LayerArrays, Page
from ...ops import StepPlan, step
from .serving import Serving
from .settings import NAME


class LessAttention(AttentionImpl[Any]):
    """vLLM's attention of one layer. It learns which when the weights are loaded (`bind`)."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "keys and values of another layer": kv_sharing_target_layer_name is not None,
            ", ".join(sorted(others)): any(value is not None for value in others.values()),
        }
        for name, found in refused.items():
            if found:
                raise ValueError(f"{NAME}: a layer with {name} is not supported")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap
        self._vllm_config = get_current_vllm_config()
        self._plan: StepPlan | None = None
        self._page: Page | None = None
        self._bound: tuple[Tensor, LayerArrays] | None = None

    def process_weights_after_loading(self, act_dtype: Any) -> None:
        """The first layer that is told of it makes all of them ready: it alone knows no name."""
        if self._plan is None:
            bind_all(self._vllm_config)

    def bind(self, layer: Any, serving: Serving) -> None:
        """Become the attention of vLLM's `layer`."""
        index = serving.index(extract_layer_index(layer.layer_name))
        shapes = serving.layer(index, self.scale, self.logits_soft_cap)
        self._page = serving.page(index)
        self._plan = serving.plan(shapes, index, self._vllm_config.device_config.device)
        layer.attn_backend = layer.attn_backend.for_page(self._page.nbytes, serving.max_model_len)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend from new tokens, and take them in.

        Parameters
        ----------
        layer
            vLLM's.
        query
            [T, Hq, D], padding behind the tokens.
        key, value
            [T, Hkv, D].
        kv_cache
            [pages, 1, 1, bytes] int8.
        attn_metadata
            `LessMetadata`; ``None`` while vLLM measures memory.
        output
            [T, Hq, D], written to.
        output_scale, output_block_scale
            Not supported.
        """
        if output_scale is not None or output_block_scale is not None:
            raise ValueError(f"{NAME}: quantised outputs are not supported")
        if attn_metadata is None:
            return output.zero_()
        plan, meta = self._plan, attn_metadata
        if plan is None:
            raise RuntimeError(f"{NAME}: {layer.layer_name} has no plan: its weights never loaded")
        arrays = self._arrays(kv_cache)
        single, total = meta.decodes, meta.num_tokens
        lengths, rows = meta.lengths, meta.rows
        if single:
            tokens = (x[:single].unsqueeze(2) for x in (query, key, value))
            found = step(plan, arrays, *tokens, lengths=lengths[:single], rows=rows[:single])
            output[:single] = found.squeeze(2)
        if single < total:
            output[single:total] = step(
                plan,
                arrays,
                *(x[single:total] for x in (query, key, value)),
                lengths=lengths[single:],
                rows=rows[single:],
                query_start_loc=meta.query_start_loc,
                max_query_len=meta.max_query_len,
            )
        return output

    def _arrays(self, kv_cache: Tensor) -> LayerArrays:
        """The arrays of all pages, as views of vLLM's buffer."""
        if self._bound is None or self._bound[0] is not kv_cache:
            if self._page is None:
                raise RuntimeError(f"{NAME}: a layer attends before it is bound")
            self._bound = (kv_cache, self._page.arrays(kv_cache[:, 0, 0]))
        return self._bound[1]


def bind_all(vllm_config: Any) -> None:
    """Make every layer with a cache of ours ready."""
    serving = Serving(vllm_config, get_tensor_model_parallel_rank())
    for layer in vllm_config.compilation_config.static_forward_context.values():
        if isinstance(getattr(layer, "impl", None), LessAttention):
            layer.impl.bind(layer, serving)
