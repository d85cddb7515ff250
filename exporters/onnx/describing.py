"""Writing ``less_cache.json`` into an exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import less_cache
from exporters.common.folders import listed
from exporters.common.manifest import FORMAT, MANIFEST
from less_cache._files import write_text
from less_cache.config import CacheConfig
from less_cache.feature_maps import FeatureMaps
from less_cache.quantization.transforms import Transforms

from .decoder import state_tensors
from .heads import ModelLayer


def write_manifest(
    folder: Path,
    model: Any,
    config: CacheConfig,
    layers: list[ModelLayer],
    maps: FeatureMaps | None,
    transforms: Transforms | None,
    *,
    opset: int,
    all_logits: bool,
) -> None:
    """Describe the files that are in `folder` now."""
    tensors = state_tensors(layers)
    state = [
        {"name": name, "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape[1:])}
        for name, x in tensors.items()
    ]
    eos = getattr(model.generation_config, "eos_token_id", None)
    data = {
        "format": FORMAT,
        "model_type": model.config.model_type,
        "vocab_size": model.config.get_text_config().vocab_size,
        "eos_token_ids": [eos] if isinstance(eos, int) else list(eos or []),
        "config": config.to_dict(),
        "maps_digest": maps.digest if maps is not None else None,
        "transforms_digest": transforms.digest if transforms is not None else None,
        "bytes_per_sequence": sum(x[0].numel() * x.element_size() for x in tensors.values()),
        "inputs": ["input_ids", "attention_mask", *(f"past.{name}" for name in tensors)],
        "outputs": ["logits", *(f"present.{name}" for name in tensors)],
        "all_logits": all_logits,
        "state": state,
        "layers": [
            {
                "policy": layer.config.policy.to_dict(),
                "rank": layer.config.rank,
                "maps": layer.kind,
                "window": layer.window,
                "runs": [
                    {
                        "heads": list(range(run.run.kv_heads.start, run.run.kv_heads.stop)),
                        "capacity": run.layer.config.capacity,
                        "recent": run.layer.config.policy.protected_recent,
                        "arrays": list(run.arrays.values()),
                    }
                    for run in layer.runs
                ],
            }
            for layer in layers
        ],
        "opset": opset,
        "less_cache": less_cache.__version__,
        "files": listed(folder),
    }
    write_text(folder / MANIFEST, json.dumps(data, indent=2) + "\n")
