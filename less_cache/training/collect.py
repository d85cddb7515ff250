"""What one layer's maps are fitted to: its queries, keys, values and outputs on known text."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..integrations.transformers.interception import Enough, intercepted
from ..integrations.transformers.model_check import attention_modules
from ..layer_config import LayerConfig
from ..layer_maps import LayerMaps
from ..quantization.transforms import LayerTransforms
from ..teacher_forced import attend, attend_all, eviction_times, stored_pairs

SIMULATED_AT_ONCE = 32
"""Sequences whose evictions are simulated together: a step's overhead is shared among them."""


@dataclass(frozen=True)
class LayerData:
    """One layer's data for n sequences of N tokens.

    Parameters
    ----------
    q
        [n, Hq, N, D], after the rotary embedding.
    k, v
        [n, Hkv, N, D].
    out
        [n, Hq, N, D], the attention's output under the full cache.
    times
        [n, Hkv, N] int32, when each pair leaves its slot (`teacher_forced.eviction_times`).
    projection
        [hidden, Hq, D], the weights of the projection that follows the attention.
    spec
        The layer whose evictions these are.
    transforms
        The bases of its codes, where it has calibrated ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    times: Tensor
    projection: Tensor
    spec: LayerConfig
    transforms: LayerTransforms | None = None

    def attend(self, maps: LayerMaps | None, chosen: Tensor, rows: Tensor) -> Tensor:
        """What the small cache gives, over the pairs as its slots and its state have them.

        Parameters
        ----------
        maps
            φ and ψ; ``None``: the policy alone.
        chosen
            [B], which sequences.
        rows
            [n], which queries.

        Returns
        -------
        Tensor
            [B, Hq, n, D].
        """
        q, k, v = (t[chosen].float() for t in (self.q, self.k, self.v))
        # Codes are read anew for every batch: kept, they would double what lies in memory.
        stored = stored_pairs(self.spec, k, v, self.transforms)
        return attend(self.spec, maps, q, k, v, self.times[chosen], rows, stored=stored)

    def project(self, out: Tensor) -> Tensor:
        """[B, Hq, n, D] -> [B, n, hidden]: what the layer adds to the residual stream."""
        return torch.einsum("bhnd,ohd->bno", out, self.projection)


def collect_layer(
    model: Any,
    tokens: Tensor,
    layer: int,
    spec: LayerConfig,
    *,
    transforms: LayerTransforms | None = None,
    batch: int = 4,
    folder: Path | None = None,
    progress: bool = True,
) -> LayerData:
    """Run the model up to one layer and keep what its attention sees and gives.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    tokens
        [n, N] token ids, no padding.
    layer
        Which full-attention layer, from 0.
    spec
        Capacity and policy whose evictions are simulated.
    transforms
        The bases of the layer's codes, where it has calibrated ones.
    batch
        Sequences a forward pass.
    folder
        Where the data lies, in files mapped into memory. Default: in memory.
    progress
        Show a bar.
    """
    modules = attention_modules(model)
    count, length = tokens.shape
    filled: dict[str, Tensor] = {}

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = full_attention(spec, q, k, v)
        if index == layer:
            for name, value in (("q", q), ("k", k), ("v", v), ("out", out)):
                if name not in filled:
                    shape = (count, value.shape[1], length, value.shape[3])
                    filled[name] = _empty(folder, name, shape, value.dtype)
                filled[name][start : start + len(q)] = value.cpu()
            raise Enough
        return out

    bar = tqdm(total=count, desc=f"layer {layer}: collect", unit="seq", disable=not progress)
    with torch.no_grad(), intercepted(model, attend), bar:
        for start in range(0, count, batch):
            ids = tokens[start : start + batch].to(model.device)
            with contextlib.suppress(Enough):
                model(ids, use_cache=False)
            bar.update(len(ids))
    times = _empty(folder, "times", filled["k"].shape[:3], torch.int32)
    bar = tqdm(total=count, desc=f"layer {layer}: evict", unit="seq", disable=not progress)
    with bar:
        for start in range(0, count, SIMULATED_AT_ONCE):
            part = slice(start, start + SIMULATED_AT_ONCE)
            q, k = (filled[name][part].to(model.device) for name in "qk")
            times[part] = eviction_times(spec, q, k, transforms=transforms).cpu()
            bar.update(len(q))
    return LayerData(
        **filled,
        times=times,
        projection=output_projection(modules[layer], spec).float().cpu(),
        spec=spec,
        transforms=transforms,
    )


def full_attention(spec: LayerConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the layer gives under the full cache. [B, Hq, N, D]."""
    if spec.softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=spec.scale, enable_gqa=spec.group > 1
        )
    never = torch.full(k.shape[:3], k.shape[2], dtype=torch.int32, device=k.device)
    return attend_all(spec, None, q, k, v, never)


def output_projection(module: Any, spec: LayerConfig) -> Tensor:
    """[hidden, Hq, D]: the weights of the linear layer after a module's attention."""
    linear = module.o_proj if hasattr(module, "o_proj") else module.dense
    weight: Tensor = linear.weight.detach()
    return weight.view(-1, spec.query_heads, spec.head_dim)


def _empty(folder: Path | None, name: str, shape: Any, dtype: torch.dtype) -> Tensor:
    """A tensor in memory, or in a file of `folder` that is mapped into it."""
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    size = torch.Size(shape).numel()
    file = str(folder / f"{name}.bin")
    return torch.from_file(file, shared=True, size=size, dtype=dtype).view(shape)
