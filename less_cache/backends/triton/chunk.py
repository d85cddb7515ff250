"""Several new tokens at once: a prompt, a chunk of one, a later turn.

The order of things is `torch_chunk`'s, and so are selection and history; attention and the sums of
its probabilities, which grow with the square of the tokens, are kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...config import LayerConfig
from ...feature_maps import LayerMaps
from ...state import LayerState
from .. import torch_chunk
from .chunk_kernels import attend_chunk, sum_columns
from .launch import block, contiguous_heads, dot_type, launch


def append(
    layer: LayerConfig,
    state: LayerState,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`Backend.append` for S > 1 tokens."""
    return torch_chunk.append(layer, state, maps, q, k, v, mask, attention=attend)


def attend(
    layer: LayerConfig,
    state: LayerState,
    maps: LayerMaps | None,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs, and each pair's weighted sum of probabilities.

    Parameters
    ----------
    layer, state, maps
        As `Backend.append` has them.
    q
        [B, Hq, S, D].
    keys, values
        [B, Hkv, C + S, D], the slots' and the new ones.
    positions
        [B, Hkv, C + S], -1 where there is no pair.
    weight
        [B, S], what each query's probabilities count for; ``None``: they are not wanted.

    Returns
    -------
    out
        [B, Hq, S, D].
    gained
        [B, Hkv, C + S] float32.
    """
    batch, query_heads, tokens, head_dim = q.shape
    q, keys, values = contiguous_heads(q), keys.contiguous(), values.contiguous()
    positions = positions.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log_mass = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    arguments: dict[str, Any] = {
        "q": q,
        "keys": keys,
        "positions": positions,
        "log_mass": log_mass,
        "tokens": tokens,
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "q_token_stride": q.stride(2),
    }
    constants: dict[str, Any] = {
        "SCALE": layer.scale,
        "SOFTCAP": layer.softcap or 0.0,
        "GROUP": layer.group,
        "CAPACITY": layer.capacity,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block(head_dim),
        "DOT": dot_type(q.dtype),
    }
    rows, columns, warps = _attention_tiles(layer)
    launch(
        attend_chunk,
        (batch * query_heads, triton.cdiv(tokens, rows)),
        {
            **arguments,
            "values": values,
            "length": state.length,
            "phi": None if maps is None else maps.phi(q).contiguous(),
            "H": state.H,
            "z": state.z,
            "out": out,
        },
        {
            **constants,
            "QUERY_HEADS": query_heads,
            "RANK": layer.rank,
            "BLOCK_M": rows,
            "BLOCK_N": columns,
        },
        warps=warps,
    )
    gained = torch.zeros(positions.shape, dtype=torch.float32, device=q.device)
    if weight is not None:
        rows, columns, warps = _sum_tiles(layer)
        launch(
            sum_columns,
            (batch * layer.kv_heads, triton.cdiv(positions.shape[2], columns)),
            {**arguments, "weight": weight.contiguous(), "gained": gained},
            {
                **constants,
                "KV_HEADS": layer.kv_heads,
                "BLOCK_M": rows,
                "BLOCK_N": columns,
            },
            warps=warps,
        )
    return out, gained


def _attention_tiles(layer: LayerConfig) -> tuple[int, int, int]:
    """Queries and columns in a tile of `attend_chunk`, and warps: none so large that it spills."""
    if layer.dtype == "float32":
        return 32, 32 if layer.head_dim <= 64 else 16, 8
    return (64, 32, 8) if layer.head_dim > 128 else (128, 32, 8)


def _sum_tiles(layer: LayerConfig) -> tuple[int, int, int]:
    """The same of `sum_columns`."""
    if layer.dtype == "float32":
        return 32, 32, 8
    return (64, 32, 8) if layer.head_dim > 128 else (64, 64, 4)
