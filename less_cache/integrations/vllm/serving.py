"""What one process serves: its share of the cache, and a plan for each of its layers."""

from __future__ import annotations

import math
from typing import Any

from ...arrays import Page
from ...config import CacheConfig, kv_shard
from ...layer_config import LayerConfig
from ...ops import StepPlan, plan_step
from ..introspection import full_attention_layers
from .settings import NAME, Settings


class Serving:
    """A model's cache as one tensor-parallel process holds it.

    Attributes
    ----------
    config : CacheConfig
        Of this process's heads.
    """

    def __init__(self, vllm_config: Any, rank: int) -> None:
        model = vllm_config.model_config
        self.settings = Settings.from_dict(vllm_config.additional_config[NAME])
        parts = self.settings.parts(model.hf_text_config, str(model.dtype).removeprefix("torch."))
        whole, world = parts.config, vllm_config.parallel_config.tensor_parallel_size
        self.config: CacheConfig = whole.shard(rank, world)
        self.max_model_len: int = model.max_model_len
        self._maps = None if parts.maps is None else parts.maps.shard(rank, world)
        self._transforms = parts.transforms
        self._kv_heads = kv_shard(whole.query_heads, whole.kv_heads, rank, world)
        self._layers = full_attention_layers(model.hf_text_config)

    def index(self, layer_index: int) -> int:
        """Which of the cache's layers layer `layer_index` of the model is."""
        return self._layers.index(layer_index)

    def page(self, index: int) -> Page:
        """A row's layout."""
        return self.config.page(index)

    def layer(self, index: int, scale: float, softcap: float | None) -> LayerConfig:
        """A layer's shapes.

        Raises
        ------
        ValueError
            If vLLM's layer computes something else.
        """
        layer = self.config.layer(index)
        for name, found, wanted in (
            ("scale", scale, layer.scale),
            ("softcap", softcap or 0.0, layer.softcap or 0.0),
        ):
            if not math.isclose(found, wanted, rel_tol=1e-5):
                raise ValueError(
                    f"{NAME}: layer {index}: vLLM has {name} = {found}, but the model's "
                    f"configuration says {wanted}"
                )
        return layer

    def plan(self, layer: LayerConfig, index: int, device: Any) -> StepPlan:
        """What steps of a layer need, on the device."""
        transforms = None if self._transforms is None else self._transforms[index]
        if transforms is not None:
            transforms = transforms.heads(self._kv_heads)
        maps = None if self._maps is None else self._maps[index]
        return plan_step(layer, maps, transforms, device=device, backend=self.settings.backend)
