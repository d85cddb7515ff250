"""Several new tokens at once: a prompt, a chunk of one, a later turn.

The order of things is the PyTorch backend's, and so are selection and history; attention and the
sums of its probabilities, which grow with the square of the tokens, are kernels. Heads go in runs
of equal capacity: prompts are long enough to fill a device with each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ...arrays import EMPTY, LayerArrays
from ...layer_config import LayerConfig
from ...layer_maps import LayerMaps
from ..torch import chunk as torch_chunk
from ..torch.slots import RunSlots, open_run
from .kernels.chunk import attend_chunk, sum_columns
from .launch import ALL_REGISTERS, block, contiguous_heads, dot_type, launch

STAGES = 3
"""Turns of a loop, of which two have their loads under way while one is computed."""


def attend(
    layer: LayerConfig,
    arrays: LayerArrays,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor,
    rows: Tensor | None = None,
    mask: Tensor | None = None,
    shift: Tensor | None = None,
    clean: bool = False,
) -> Tensor:
    """`Backend.attend` for S > 1 tokens."""
    own_rows = None if rows is None else rows.long()
    outs = []
    for run in layer.runs:
        held = open_run(run, arrays, own_rows, None if clean else lengths)
        own_maps = None if maps is None else maps.heads(run.query_heads, run.kv_heads)
        out = torch_chunk.attend(
            run.layer,
            held,
            own_maps,
            q[:, run.query_heads],
            k[:, run.kv_heads],
            v[:, run.kv_heads],
            lengths,
            mask,
            None if shift is None else shift[:, run.query_heads],
            attention_function=functools.partial(attention, lengths),
        )
        held.close()
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def attention(
    lengths: Tensor,
    layer: LayerConfig,
    slots: RunSlots,
    maps: LayerMaps | None,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    weight: Tensor | None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The outputs, and each pair's weighted sum of probabilities.

    Parameters
    ----------
    lengths
        [B], tokens seen before these.
    layer, slots, maps, q, keys, values, positions, weight, shift
        As the PyTorch backend's `attention.in_blocks` has them.

    Returns
    -------
    out
        [B, Hq, S, D].
    gained
        [B, heads, C + S] float32.
    """
    batch, query_heads, tokens, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    features = None if maps is None else maps.phi(q).contiguous()
    # Coded pairs come in wider numbers than the model's.
    q, keys, values = (array.to(getattr(torch, layer.dtype)) for array in (q, keys, values))
    q, keys, values = contiguous_heads(q), keys.contiguous(), values.contiguous()
    values, positions, spoilt_from = _finite(keys, values, positions)
    log_mass = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    arguments: dict[str, Any] = {
        "q": q,
        "keys": keys,
        "positions": positions,
        "log_mass": log_mass,
        "tokens": tokens,
        "capacity": layer.capacity,
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "q_token_stride": q.stride(2),
    }
    constants: dict[str, Any] = {
        "SCALE": layer.scale,
        "SOFTCAP": layer.softcap or 0.0,
        "GROUP": layer.group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block(head_dim),
        "DOT": dot_type(q.dtype),
    }
    tile_rows, columns, warps = _attention_tiles(layer)
    launch(
        attend_chunk,
        (batch * query_heads, triton.cdiv(tokens, tile_rows)),
        {
            **arguments,
            "values": values,
            "lengths": lengths.contiguous(),
            "spoilt_from": spoilt_from,
            "phi": features,
            "shift": None if shift is None else shift.contiguous(),
            # Of a run of heads in a pool's page, they need not be in one piece.
            "H": slots.H.contiguous(),
            "z": slots.z.contiguous(),
            "out": out,
        },
        {
            **constants,
            "QUERY_HEADS": query_heads,
            "RANK": layer.rank,
            "BLOCK_M": tile_rows,
            "BLOCK_N": columns,
        },
        device=q.device,
        warps=warps,
        stages=STAGES,
        registers=ALL_REGISTERS if layer.dtype == "float32" else None,
    )
    gained = torch.zeros(positions.shape, dtype=torch.float32, device=q.device)
    if weight is not None:
        tile_rows, columns, warps = _sum_tiles(layer)
        launch(
            sum_columns,
            (batch * layer.kv_heads, triton.cdiv(positions.shape[2], columns)),
            {**arguments, "weight": weight.contiguous(), "gained": gained},
            {
                **constants,
                "KV_HEADS": layer.kv_heads,
                "BLOCK_M": tile_rows,
                "BLOCK_N": columns,
            },
            device=q.device,
            warps=warps,
            stages=STAGES,
        )
    return out, gained


def _finite(keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finite values, positions without those of pairs that are not, and the first such column.

    A masked probability is 0, and 0 * NaN is no 0: such a pair is left out, and spoils afterwards
    the queries that see it. All are contiguous: [B, heads, C + S, D], [B, heads, C + S] and, of
    each head, [B, heads] int32.
    """
    numbers = values.isfinite()
    bad = ~(keys.isfinite() & numbers).all(3) & (positions != EMPTY)
    count = positions.shape[2]
    columns = torch.arange(count, dtype=torch.int32, device=keys.device)
    first = torch.where(bad, columns, count).amin(2)
    return values.masked_fill(~numbers, 0), positions.masked_fill(bad, EMPTY), first


def _attention_tiles(layer: LayerConfig) -> tuple[int, int, int]:
    """Queries and columns in a tile of `attend_chunk`, and warps: none so large that it spills."""
    if layer.dtype == "float32":
        return 32, 32 if layer.head_dim <= 64 else 16, 8
    return (64, 32, 8) if layer.head_dim > 128 else (128, 64, 8)


def _sum_tiles(layer: LayerConfig) -> tuple[int, int, int]:
    """The same of `sum_columns`."""
    if layer.dtype == "float32":
        return 32, 32, 8
    return (64, 32, 8) if layer.head_dim > 128 else (64, 64, 4)
