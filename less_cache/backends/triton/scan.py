"""When each pair of known sequences leaves: one kernel launch for each run of equal heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..._checks import check_int
from ...arrays import EMPTY, LayerArrays, empty_arrays
from ...layer_config import LayerConfig
from ...quantization import codes
from . import chunk
from .kernels.scan import scan
from .launch import ALL_REGISTERS, block, check_device, contiguous_heads, launch
from .plans import policy_constants

LARGEST_CAPACITY = 4096
"""Slots whose scores and positions fit into one program's registers."""

LARGEST_CHUNK = 32
"""Numbers of each key that are multiplied at a time."""

TILE_REGISTERS = 32
"""Numbers of a tile of keys that one thread may hold."""


@torch.no_grad()
def eviction_times(
    layer: LayerConfig, q: Tensor, k: Tensor, mask: Tensor | None = None, *, prompt: int = 1
) -> Tensor:
    """When each pair of known sequences leaves its slot, the cache being empty at first.

    Parameters
    ----------
    layer
        Capacities, policy, scale; its rank does not matter.
    q
        [B, Hq, S, D], after the rotary embedding.
    k
        [B, Hkv, S, D], likewise.
    mask
        [B, S] booleans, false at padding; ``None``: no padding.
    prompt
        How many of the first tokens come in one call; the others come one by one.

    Returns
    -------
    Tensor
        [B, Hkv, S] int32: the first query that no longer finds the pair in a slot; S for pairs
        that stay; at padding, which never is in a slot, its own index.

    Raises
    ------
    ValueError
        If `prompt` is not between 1 and S, a capacity too large, a policy that never evicts has no
        room for all, the tensors are not on a GPU, or float64.
    """
    check_device(k)
    batch, kv_heads, tokens, _ = k.shape
    check_int("prompt", prompt, minimum=1, maximum=tokens)
    if k.dtype == torch.float64:
        raise ValueError("k: got float64, which backend 'triton' does not compute in")
    least, most = min(layer.capacities), max(layer.capacities)
    if not layer.policy.evicts and tokens > least:
        raise ValueError(f"k: {tokens} tokens, but {layer.policy} holds at most capacity = {least}")
    if most > LARGEST_CAPACITY and layer.policy.evicts:
        raise ValueError(f"capacity: got {most}, expected at most {LARGEST_CAPACITY}")
    q, k = contiguous_heads(q), contiguous_heads(k)
    times = torch.full((batch, kv_heads, tokens), tokens, dtype=torch.int32, device=k.device)
    if mask is not None:
        own = torch.arange(tokens, dtype=torch.int32, device=k.device)
        times = torch.where(mask.unsqueeze(1), times, own)
    if not layer.policy.evicts:
        return times
    order = None
    if mask is not None:
        # A sort that keeps the order puts the real columns first: position p is the p-th of them.
        order = mask.logical_not().to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)
    parts = [
        _scan_run(
            _sparse(run.layer, k),
            q[:, run.query_heads],
            k[:, run.kv_heads],
            mask,
            order,
            prompt,
            times[:, run.kv_heads].contiguous(),
        )
        for run in layer.runs
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _scan_run(
    layer: LayerConfig,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    prompt: int,
    times: Tensor,
) -> Tensor:
    """`times` of heads of equal capacity, with what leaves filled in."""
    batch, kv_heads, tokens, head_dim = k.shape
    arrays = empty_arrays(layer, batch, device=k.device)
    lengths = torch.zeros(batch, dtype=torch.int32, device=k.device)
    begin = 0
    if prompt > 1:
        lengths = _take_prompt(layer, arrays, q, k, mask, order, prompt, times)
        begin = prompt
    stored = k
    if layer.key_layout is not None:
        k = k.contiguous()
        stored = codes.decode(layer.key_layout, *codes.encode(layer.key_layout, k), k.dtype)
    arguments: dict[str, Any] = {
        "q": q,
        "k": stored,
        # In its own step a coded pair is attended as it came.
        "own": None if layer.key_layout is None else k,
        "mask": None if mask is None else mask.view(torch.uint8),
        "order": order,
        "positions": arrays.positions,
        "scores": arrays.scores,
        "history": arrays.history,
        "lengths": lengths,
        "times": times,
        "begin": begin,
        "tokens": tokens,
        "capacity": layer.capacity,
        "sinks": layer.policy.sinks,
        "recent": layer.policy.protected_recent,
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "q_token_stride": q.stride(2),
        "k_row_stride": k.stride(0),
        "k_head_stride": k.stride(1),
        "k_token_stride": k.stride(2),
        "mask_row_stride": 0 if mask is None else mask.stride(0),
        "mask_token_stride": 0 if mask is None else mask.stride(1),
    }
    slots = block(layer.capacity)
    warps = 4 if slots <= 512 else 8 if slots <= 2048 else 16
    constants = {
        "HAS_MASK": mask is not None,
        **policy_constants(layer),
        "GROUP": layer.group,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_C": slots,
        "BLOCK_D": block(head_dim),
        "CHUNK": min(block(head_dim), LARGEST_CHUNK, TILE_REGISTERS * 32 * warps // slots),
    }
    launch(
        scan,
        (batch * kv_heads,),
        arguments,
        constants,
        device=k.device,
        warps=warps,
        # Left alone, the assembler would rather spill some.
        registers=ALL_REGISTERS,
    )
    return times


def _sparse(layer: LayerConfig, k: Tensor) -> LayerConfig:
    """The layer without a low-rank state, which no eviction depends on."""
    dtype = str(k.dtype).removeprefix("torch.")
    return dataclasses.replace(layer, rank=0, dtype=dtype, position_dtype="int32")


def _take_prompt(
    layer: LayerConfig,
    arrays: LayerArrays,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    order: Tensor | None,
    prompt: int,
    times: Tensor,
) -> Tensor:
    """Take the prompt into `arrays`, and note in `times` what its end evicts; the lengths then."""
    batch, kv_heads = k.shape[:2]
    keys = k[:, :, :prompt]
    mask = None if mask is None else mask[:, :prompt]
    lengths = torch.zeros(batch, dtype=torch.int32, device=k.device)
    chunk.attend(
        layer, arrays, None, q[:, :, :prompt], keys, keys, lengths=lengths, mask=mask, clean=True
    )
    positions = arrays.positions.view(batch, kv_heads, -1)
    columns = positions.clamp_min(0).long()
    if order is not None:
        columns = order.long().unsqueeze(1).expand(-1, kv_heads, -1).gather(2, columns)
    # Column `prompt` stands for the empty slots.
    columns = columns.masked_fill_(positions == EMPTY, prompt)
    gone = torch.ones(*times.shape[:2], prompt + 1, dtype=torch.bool, device=k.device)
    gone = gone.scatter_(2, columns, False)[:, :, :prompt]
    if mask is not None:
        gone = gone & mask.unsqueeze(1)
    times[:, :, :prompt].masked_fill_(gone, prompt)
    return lengths + (prompt if mask is None else mask.sum(1, dtype=torch.int32))
