"""Names of a layer's arrays in exported files, where heads of equal capacity share one."""

from __future__ import annotations

from less_cache.layer_config import LayerConfig, Run


def run_name(index: int, layer: LayerConfig, run: Run) -> str:
    """What names of a run's arrays begin with.

    ``"3"`` where all heads of layer 3 have the same capacity, as in ``3.keys``; otherwise
    ``"3.h2"``, the run's first KV head being 2, as in ``3.h2.keys``.
    """
    return str(index) if layer.is_uniform else f"{index}.h{run.first}"
