"""The checks of what comes into a step, and packed sequences made into a batch and back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import check_dense
from .arrays import MAX_SHORT_TOKENS, MAX_TOKENS, Array, LayerArrays, array_shapes
from .layer_config import LayerConfig
from .policies import Gain


def check_tokens(layer: LayerConfig, keys: Array, batch: int, q: Array, k: Array, v: Array) -> None:
    """Refuse new tokens that do not fit the layer.

    Parameters
    ----------
    layer
        Shapes.
    keys
        The stored ones: of which library, dtype and device the others must be.
    batch
        B.
    q, k, v
        Expected: [B, Hq, S, D] and [B, Hkv, S, D], S >= 1.

    Raises
    ------
    ValueError, TypeError
        That names the argument.
    """
    tokens = None
    library = np.ndarray if isinstance(keys, np.ndarray) else Tensor
    dtype = keys.dtype
    if layer.quantization is not None:
        # What is stored then are codes.
        dtype = np.dtype(layer.dtype) if library is np.ndarray else getattr(torch, layer.dtype)
    # First k: it says how many tokens are new.
    for name, array, heads in (
        ("k", k, layer.kv_heads),
        ("q", q, layer.query_heads),
        ("v", v, layer.kv_heads),
    ):
        _check_kind(name, array, keys, library, dtype)
        if array.ndim != 4:
            raise ValueError(
                f"{name}: got shape {tuple(array.shape)}, expected [batch, heads, tokens, head_dim]"
            )
        if tokens is None:
            tokens = array.shape[2]
        expected = (batch, heads, tokens, layer.head_dim)
        if array.shape != expected:
            raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected {expected}")
    if not tokens:
        raise ValueError("k: got 0 tokens, expected at least 1")


def _check_kind(name: str, array: Any, keys: Array, library: Any, dtype: Any) -> None:
    if not isinstance(array, library):
        raise TypeError(
            f"{name}: got {type(array).__name__}, but the state's arrays are {library.__name__}"
        )
    check_dense(name, array)
    if array.dtype != dtype:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected {dtype}")
    if isinstance(array, Tensor) and array.device != keys.device:
        raise ValueError(f"{name}: on device {array.device}, expected {keys.device}")


def checked_mask(k: Array, mask: Any) -> Any:
    """The mask [B, S] as booleans.

    Raises
    ------
    ValueError, TypeError
        If it is no array of k's library and device, of that shape, that holds 0 and 1 alone. On a
        GPU the values of an integer mask are not looked at, which would wait for the device: what
        is not 0 counts as 1.
    """
    if mask is None:
        return None
    numpy = isinstance(k, np.ndarray)
    if not isinstance(mask, np.ndarray if numpy else Tensor):
        expected = "ndarray" if numpy else "Tensor"
        raise TypeError(f"mask: got {type(mask).__name__}, expected {expected}")
    check_dense("mask", mask)
    expected_shape = (k.shape[0], k.shape[2])
    if tuple(mask.shape) != expected_shape:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected [batch, tokens] = {expected_shape}"
        )
    if not numpy and mask.device != k.device:
        raise ValueError(f"mask: on device {mask.device}, expected {k.device}")
    if mask.dtype in (bool, torch.bool):
        return mask
    kinds: Any = mask.dtype
    integer = kinds.kind in "iu" if numpy else not (kinds.is_floating_point or kinds.is_complex)
    if not integer:
        raise TypeError(
            f"mask: got dtype {mask.dtype} (it could hold NaN), expected booleans or 0 and 1"
        )
    readable = numpy or (not torch.compiler.is_compiling() and _on_host(mask))
    if readable and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"mask: got values {mask.min()} to {mask.max()}, expected only 0 and 1")
    return mask != 0


def _on_host(array: Any) -> bool:
    """Whether looking at the numbers waits for nobody."""
    return isinstance(array, np.ndarray) or bool(array.device.type == "cpu")


def check_arrays(layer: LayerConfig, arrays: LayerArrays) -> None:
    """Refuse arrays that are not those of the layer.

    Raises
    ------
    ValueError, TypeError
        That names the array.
    """
    if not isinstance(arrays, LayerArrays):
        raise TypeError(f"arrays: got {type(arrays).__name__}, expected LayerArrays")
    named = arrays.named()
    shapes = array_shapes(layer)
    if set(named) != set(shapes):
        raise ValueError(f"arrays: got {sorted(named)}, expected {sorted(shapes)}")
    for name, array in named.items():
        if not isinstance(array, (np.ndarray, Tensor)):
            raise TypeError(
                f"arrays.{name}: got {type(array).__name__}, expected a tensor or an array"
            )
        check_dense(f"arrays.{name}", array)
    pool = arrays.keys.shape[0] if arrays.keys.ndim else 0
    for name, (shape, dtype) in shapes.items():
        array = named[name]
        if tuple(array.shape) != (pool, *shape):
            raise ValueError(
                f"arrays.{name}: got shape {tuple(array.shape)}, expected {(pool, *shape)}"
            )
        if str(array.dtype).removeprefix("torch.") != dtype:
            raise TypeError(f"arrays.{name}: got dtype {array.dtype}, expected {dtype}")
        if isinstance(array, np.ndarray) != isinstance(arrays.keys, np.ndarray):
            raise TypeError(
                f"arrays.{name}: got {type(array).__name__} beside {type(arrays.keys).__name__}s"
            )
        if isinstance(array, Tensor):
            _check_tensor(f"arrays.{name}", array, arrays.keys)


def _check_tensor(name: str, array: Tensor, keys: Tensor) -> None:
    """Refuse what is on another device than the keys, or may not be written to."""
    if array.device != keys.device:
        raise ValueError(f"{name}: on device {array.device}, expected {keys.device}")
    if array.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name}: made under torch.inference_mode(), outside of which nobody may write to it"
        )


def _check_numbers(name: str, array: Any, size: int | None, k: Array) -> None:
    """Refuse what is no [size] array of int32 or int64 beside `k`.

    Raises
    ------
    ValueError, TypeError
        That names the argument.
    """
    library = np.ndarray if isinstance(k, np.ndarray) else Tensor
    if not isinstance(array, library):
        raise TypeError(f"{name}: got {type(array).__name__}, expected {library.__name__}")
    check_dense(name, array)
    if str(array.dtype).removeprefix("torch.") not in ("int32", "int64"):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected int32 or int64")
    if array.ndim != 1 or (size is not None and array.shape[0] != size):
        expected = "batch" if size is None else size
        raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected [{expected}]")
    if isinstance(array, Tensor) and array.device != k.device:
        raise ValueError(f"{name}: on device {array.device}, expected {k.device}")


def check_pool(arrays: LayerArrays, lengths: Any, rows: Any) -> None:
    """Refuse lengths and rows that do not go with the arrays.

    Raises
    ------
    ValueError, TypeError
        That names the argument. On a GPU the numbers themselves are not looked at.
    """
    pool = len(arrays.keys)
    _check_numbers("lengths", lengths, None, arrays.keys)
    readable = _on_host(lengths)
    if readable and len(lengths) and int(lengths.min()) < 0:
        raise ValueError(f"lengths: got {int(lengths.min())}, expected 0 or more")
    if rows is None:
        if len(lengths) > pool:
            raise ValueError(f"lengths: got {len(lengths)} sequences, but the arrays have {pool}")
        return
    _check_numbers("rows", rows, len(lengths), arrays.keys)
    if readable and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < pool:
        raise ValueError(
            f"rows: got {int(rows.min())} to {int(rows.max())}, expected 0 to {pool - 1}"
        )


def check_packed(
    layer: LayerConfig, keys: Array, lengths: Array, q: Any, k: Any, v: Any, first: Any
) -> None:
    """Refuse packed tokens [T, H, D] and `query_start_loc` [B + 1] that do not go together.

    Raises
    ------
    ValueError, TypeError
        That names the argument. On a GPU the numbers themselves are not looked at.
    """
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_dense(name, array)
        if getattr(array, "ndim", None) != 3:
            raise ValueError(
                f"{name}: got shape {tuple(getattr(array, 'shape', ()))}, expected packed tokens "
                "[tokens, heads, head_dim]"
            )
    check_tokens(layer, keys, 1, *(x.swapaxes(0, 1)[None] for x in (q, k, v)))
    _check_numbers("query_start_loc", first, len(lengths) + 1, keys)
    if _on_host(first):
        numbers = [int(number) for number in first]
        if numbers[0] != 0 or numbers[-1] != k.shape[0] or numbers != sorted(numbers):
            raise ValueError(
                f"query_start_loc: got {numbers}, expected numbers that ascend from 0 to the "
                f"tokens, {k.shape[0]}"
            )
        for index, (start, stop) in enumerate(pairwise(numbers)):
            total = int(lengths[index]) + stop - start
            if total > most_tokens(layer):
                raise _no_room(layer, total)


MOST_SUMMED = 2**24
"""A float32 that gains no more than 1 at a time stops growing here; one that gains g, at g times as
much, and so after as many tokens."""


def most_tokens(layer: LayerConfig) -> int:
    """How many tokens a sequence may have in all."""
    if not layer.policy.evicts:
        return min(layer.capacities)
    most = MAX_SHORT_TOKENS if layer.position_dtype == "int16" else MAX_TOKENS
    return min(most, MOST_SUMMED) if _sums_for_ever(layer) else most


def no_room(layer: LayerConfig) -> str:
    """Why a sequence may have no more than `most_tokens`."""
    most = most_tokens(layer)
    if not layer.policy.evicts:
        return f"{type(layer.policy).__name__} holds at most capacity = {most}"
    if layer.position_dtype == "int16":
        return (
            f"a sequence has at most {most}: positions of coded slots are 16-bit numbers where "
            "max_positions allows it; a larger max_positions makes them 32-bit numbers"
        )
    if _sums_for_ever(layer):
        return (
            f"{layer.policy} sums in float32, and sums may stop growing beyond {most}; DecayedH2O "
            "has no such end"
        )
    return f"a sequence has at most {most}: positions are 32-bit numbers"


def _sums_for_ever(layer: LayerConfig) -> bool:
    policy = layer.policy
    return policy.gains is Gain.SUM and policy.decay == 1 and layer.score_dtype == "float32"


def check_room(layer: LayerConfig, lengths: Array, mask: Array | None, new_tokens: int) -> None:
    """Refuse more tokens than `most_tokens`; on a GPU nobody looks.

    Raises
    ------
    ValueError
        If there are more.
    """
    if not len(lengths) or not _on_host(lengths):
        return
    # In 64 bits, which do not wrap where lengths of 32 bits would.
    longest = lengths if mask is None else lengths + mask.sum(1)
    total = int(longest.max()) + (new_tokens if mask is None else 0)
    if total > most_tokens(layer):
        raise _no_room(layer, total)


def _no_room(layer: LayerConfig, total: int) -> ValueError:
    return ValueError(f"k: {total} tokens in all, but {no_room(layer)}")


Attend = Callable[..., Array]
"""(q, k, v, lengths, rows, mask), all of a batch, -> out."""


def run_packed(
    attend: Attend,
    q: Array,
    k: Array,
    v: Array,
    *,
    lengths: Array,
    rows: Array | None,
    query_start_loc: Array,
    max_query_len: int | None,
) -> Array:
    """Run a step over packed sequences: [T, H, D], sequence i from ``query_start_loc[i]`` on.

    Where the host can read where sequences begin, those of as many tokens go together, new
    sequences and older ones apart, without padding. On a GPU nobody asks: all are padded to
    `max_query_len`, or to T.
    """
    first = query_start_loc
    if isinstance(q, Tensor) and q.device.type != "cpu":
        limit = q.shape[0] if max_query_len is None else min(max_query_len, q.shape[0])
        return _run_padded(attend, q, k, v, lengths, rows, first, limit)
    out = np.zeros_like(q) if isinstance(q, np.ndarray) else torch.zeros_like(q)
    starts, before = first.tolist(), lengths.tolist()
    counts = [stop - start for start, stop in pairwise(starts)]
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, count in enumerate(counts):
        if count:
            groups.setdefault((count, before[i] > 0), []).append(i)
    for (tokens, _), group in groups.items():
        columns = [starts[i] + offset for i in group for offset in range(tokens)]
        if len(columns) == columns[-1] - columns[0] + 1:
            taken: Any = slice(columns[0], columns[-1] + 1)
        else:
            taken = columns
        batch = [_swapped(x[taken].reshape(len(group), tokens, *x.shape[1:])) for x in (q, k, v)]
        pool = group if rows is None else rows[group]
        if rows is None:
            pool = np.asarray(group) if isinstance(q, np.ndarray) else torch.tensor(group)
        found = attend(*batch, lengths[group], pool, None)
        out[taken] = _swapped(found).reshape(-1, *q.shape[1:])
    return out


def _run_padded(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    first: Tensor,
    limit: int,
) -> Tensor:
    """Without a host read: token j of sequence i is column j of row i, as far as there is one."""
    begin, counts = first[:-1].long(), (first[1:] - first[:-1]).long()
    column = torch.arange(limit, device=q.device)
    mask = column < counts.unsqueeze(1)
    token = (begin.unsqueeze(1) + column).clamp_max(q.shape[0] - 1)
    out = attend(*(x[token].transpose(1, 2) for x in (q, k, v)), lengths, rows, mask)
    # Every token has one place in the batch; padding goes to a place that is cut off again.
    place = torch.where(mask, token, q.shape[0]).flatten()
    packed = q.new_zeros(q.shape[0] + 1, *q.shape[1:])
    packed[place] = out.transpose(1, 2).flatten(0, 1)
    return packed[:-1]


def _swapped(array: Array) -> Array:
    return array.swapaxes(1, 2)
