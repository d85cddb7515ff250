"""Names of a layer's arrays in exported files, where heads of equal capacity share one."""

from __future__ import annotations

import dataclasses

from less_cache.config import CacheConfig
from less_cache.layer_config import LayerConfig, Run


def exported_layer(config: CacheConfig, index: int) -> LayerConfig:
    """A layer as exported files have it: TensorRT has no integers of 16 bits for positions."""
    return dataclasses.replace(config.layer(index), position_dtype="int32")


def run_name(index: int, layer: LayerConfig, run: Run) -> str:
    """What names of a run's arrays begin with.

    ``"3"`` where all heads of layer 3 have the same capacity, as in ``3.keys``; otherwise
    ``"3.h2"``, the run's first KV head being 2, as in ``3.h2.keys``.
    """
    return str(index) if layer.is_uniform else f"{index}.h{run.first}"
