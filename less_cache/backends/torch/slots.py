"""The one place where the PyTorch backend reads and writes what is stored of a call's rows.

Keys and values are kept in the dtype of storing, or as codes and scales, and come out in the dtype
of computing. The small arrays (scores, positions, history, H, z) of the rows in question are at
hand as dense tensors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...arrays import EMPTY, PAIRS, LayerArrays
from ...layer_config import LayerConfig, Run
from ...quantization import codes
from .fields import fields_of


@dataclass
class RunSlots:
    """What the rows of a call hold for one run of heads of equal capacity C.

    Or for all heads of a layer, whatever their capacities: the slots then are as those of one head
    of N slots, and what concerns a pair a head has the heads on the slots' axis (`turned`).

    Parameters
    ----------
    layer
        The run's heads as a layer of their own.
    stored
        All rows of the pool, [P, heads, C, ...]; views of the layer's arrays.
    rows
        [B] int64, which of them the call is about; ``None``: all, in order.
    positions, scores, history, H, z
        Of those rows, [B, heads, ...]: views of `stored` where `rows` is ``None``, else copies,
        which `close` puts back.
    whole, runs
        The layer's arrays and its runs, where the slots are as those of one head.
    """

    layer: LayerConfig
    stored: LayerArrays
    rows: Tensor | None
    positions: Tensor
    H: Tensor
    z: Tensor
    scores: Tensor | None
    history: Tensor | None
    whole: LayerArrays | None = None
    runs: tuple[Run, ...] = ()

    @property
    def wide(self) -> torch.dtype:
        """The dtype of computing."""
        return getattr(torch, self.layer.score_dtype)

    def turned(self, new: Tensor) -> Tensor:
        """One pair a head [B, heads, 1, ...] as pairs of the heads in `stored`, or back."""
        return new.transpose(1, 2) if self.runs else new

    @functools.cached_property
    def first(self) -> Tensor:
        """[heads], where each head's slots begin in slots that are as those of one head."""
        capacities = tuple(c for run in self.runs for c in run.layer.capacities)
        return _firsts(capacities, self.positions.device)

    def each_head(self) -> Iterator[tuple[int, slice]]:
        """Where heads lie in slots that are as those of one head."""
        for run in self.runs:
            size = run.layer.capacity
            for head in range(run.heads):
                start = run.offset + head * size
                yield run.first + head, slice(start, start + size)

    def of_run(self, run: Run) -> RunSlots:
        """One run of slots that are as those of one head."""
        if self.whole is None:
            raise AssertionError("the slots are those of one run")
        small = {
            name: array[:, 0, run.slots].unflatten(1, (run.heads, run.layer.capacity))
            for name in ("scores", "positions", "history")
            if (array := getattr(self, name)) is not None
        }
        own = {
            "scores": None,
            "history": None,
            **small,
            "H": self.H[:, run.kv_heads],
            "z": self.z[:, run.kv_heads],
        }
        return RunSlots(run.layer, self.whole.of_run(run), self.rows, **own)

    def close(self) -> None:
        """Put the small arrays back to where the pool keeps them."""
        if self.rows is None:
            return
        for name in ("scores", "positions", "H", "z", "history"):
            array = getattr(self, name)
            if array is not None:
                getattr(self.stored, name).index_copy_(0, self.rows, array)

    def products(self, queries: Tensor) -> Tensor:
        """q·k of queries [B, heads, M, D] with every key, none coded: [B, heads, M, C]."""
        queries = queries.to(self.wide)
        keys = self.stored.keys
        if self._in_one_piece:
            if queries.shape[2] == 1:
                # For a single query, a CPU reads keys up to three times as fast when they come
                # first.
                return (keys @ queries.contiguous().transpose(2, 3)).transpose(2, 3)
            return queries @ keys.transpose(2, 3)
        if keys.device.type != "cpu":
            return queries @ self._chosen(keys).transpose(2, 3)
        batch, heads, count, _ = queries.shape
        out = queries.new_empty(batch, heads, keys.shape[2], count)
        for i, row in enumerate(self._row_numbers):
            torch.matmul(keys[row].to(self.wide), queries[i].transpose(1, 2), out=out[i])
        return out.transpose(2, 3)

    def mix(self, weights: Tensor) -> Tensor:
        """Σ weight · v over every value, none coded: [B, heads, M, D] from [B, heads, M, C]."""
        values = self.stored.values
        if self._in_one_piece:
            return weights @ values
        if values.device.type != "cpu":
            return weights @ self._chosen(values)
        batch, heads, count, _ = weights.shape
        out = weights.new_empty(batch, heads, count, values.shape[3])
        for i, row in enumerate(self._row_numbers):
            torch.matmul(weights[i], values[row].to(self.wide), out=out[i])
        return out

    def take(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value in one slot a head, [B, heads, 1, D] each; `slot` [B, heads, 1]."""
        found = {name: self._at(array, slot) for name, array in pairs_of(self.stored).items()}
        if self.layer.key_layout is None or self.layer.value_layout is None:
            return as_read(self.layer, found, self.wide)
        layouts = (self.layer.key_layout, self.layer.value_layout)
        keys, values = (fields_of(layout, self.wide, slot.device) for layout in layouts)
        return (
            keys.decode(found["keys"], found["key_scales"]),
            values.decode(found["values"], found["value_scales"]),
        )

    def put(self, slot: Tensor, k: Tensor, v: Tensor, incoming: Tensor | None) -> None:
        """Store one pair a head, [B, heads, 1, D] each, in the rows that have an incoming one.

        Parameters
        ----------
        slot
            [B, heads, 1].
        k, v
            [B, heads, 1, D].
        incoming
            [B, 1, 1] booleans; ``None``: all rows have one.
        """
        for name, value in as_stored(self.layer, self.stored, k, v).items():
            stored = getattr(self.stored, name)
            if incoming is not None:
                has = incoming if value.ndim == 3 else incoming.unsqueeze(3)
                value = torch.where(has, value, self._at(stored, slot))
            if self.rows is None:
                stored.scatter_(2, _along(slot, stored), value)
            else:
                stored[self._places(slot)] = value

    def chosen_pairs(self) -> dict[str, Tensor]:
        """What is stored of the rows' pairs, [B, heads, C, ...], by name as in `PAIRS`."""
        return {name: self._chosen(array) for name, array in pairs_of(self.stored).items()}

    def join(self, k: Tensor, v: Tensor) -> Union:
        """The rows' pairs and new ones behind them, [B, heads, S, D] each."""
        new = as_stored(self.layer, self.stored, k, v)
        old = self.chosen_pairs()
        stored = {name: torch.cat([old[name], new[name]], 2) for name in old}
        if self.layer.key_layout is None:
            return Union(self.layer, stored, stored["keys"], stored["values"])
        # Their own step reads new pairs as they came, not as they are coded.
        keys, values = as_read(self.layer, old, self.wide)
        keys, values = (
            torch.cat([keys, k.to(self.wide)], 2),
            torch.cat([values, v.to(self.wide)], 2),
        )
        return Union(self.layer, stored, keys, values)

    def replace(self, union: Union, columns: Tensor, empty: Tensor) -> None:
        """Store the union's pairs of these columns in place of all: both [B, heads, C]."""
        for name, array in union.stored.items():
            new = _take(array, columns)
            new = new.masked_fill_(empty if new.ndim == 3 else empty.unsqueeze(3), 0)
            stored = getattr(self.stored, name)
            if self.rows is None:
                stored.copy_(new)
            else:
                stored.index_copy_(0, self.rows, new)

    def clear(self, fresh: Tensor) -> None:
        """Make the rows that `fresh` [B] names empty, whatever they held."""
        if fresh.device.type == "cpu":
            # There is nothing to wait for, and mostly nothing to do.
            chosen = fresh.nonzero().flatten()
            if not len(chosen):
                return
            pool = chosen if self.rows is None else self.rows[chosen]
            for pairs in pairs_of(self.stored).values():
                pairs[pool] = 0
            for array in (self.scores, self.H, self.z, self.history):
                if array is not None:
                    array[chosen] = 0
            self.positions[chosen] = EMPTY
            return
        shape = (-1, 1, 1, 1)
        for stored in pairs_of(self.stored).values():
            own = self._chosen(stored)
            own = own.masked_fill(fresh.view(shape[: own.ndim]), 0)
            if self.rows is None:
                stored.copy_(own)
            else:
                stored.index_copy_(0, self.rows, own)
        for array in (self.scores, self.z, self.history):
            if array is not None:
                array.masked_fill_(fresh.view(shape[1:]), 0)
        self.H.masked_fill_(fresh.view(shape), 0)
        self.positions.masked_fill_(fresh.view(shape[1:]), EMPTY)

    @functools.cached_property
    def _in_one_piece(self) -> bool:
        """Whether one product reads all keys as they lie, with nothing to copy or convert."""
        keys = self.stored.keys
        whole = self.rows is None and keys.is_contiguous() and self.stored.values.is_contiguous()
        return whole and keys.dtype == self.wide

    @functools.cached_property
    def _row_numbers(self) -> list[int] | range:
        return range(self.positions.shape[0]) if self.rows is None else self.rows.tolist()

    def _chosen(self, stored: Tensor) -> Tensor:
        return stored if self.rows is None else stored.index_select(0, self.rows)

    def _places(self, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = torch.arange(slot.shape[1], device=slot.device)
        if self.rows is None:
            raise AssertionError("only rows of a pool are addressed one by one")
        return self.rows.view(-1, 1, 1), heads.unsqueeze(1), slot

    def _at(self, stored: Tensor, slot: Tensor) -> Tensor:
        if self.rows is None:
            return stored.gather(2, _along(slot, stored))
        return stored[self._places(slot)]


@dataclass
class Union:
    """The pairs of a call's rows, C old ones and S new ones.

    Parameters
    ----------
    layer
        The run's heads as a layer of their own.
    stored
        What slots hold of them, or will: [B, heads, C + S, ...].
    keys, values
        [B, heads, C + S, D], as attention reads them.
    """

    layer: LayerConfig
    stored: dict[str, Tensor]
    keys: Tensor
    values: Tensor

    def take(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some columns [B, heads, n], as slots would give them back."""
        found = {name: _take(array, columns) for name, array in self.stored.items()}
        return as_read(self.layer, found, self.keys.dtype)


def as_stored(layer: LayerConfig, stored: LayerArrays, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """What slots hold of pairs [..., D]: in the dtype of storing, or codes and scales."""
    if layer.key_layout is None or layer.value_layout is None:
        return {"keys": k.to(stored.keys.dtype), "values": v.to(stored.values.dtype)}
    key_codes, key_scales = fields_of(layer.key_layout, k.dtype, k.device).encode(k)
    value_codes, value_scales = fields_of(layer.value_layout, v.dtype, v.device).encode(v)
    return {
        "keys": key_codes,
        "values": value_codes,
        "key_scales": key_scales,
        "value_scales": value_scales,
    }


def as_read(
    layer: LayerConfig, stored: dict[str, Tensor], wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [..., D] of what slots hold; `wide` is the dtype of computing."""
    if layer.key_layout is None or layer.value_layout is None:
        return stored["keys"].to(wide), stored["values"].to(wide)
    return codes.decode_pairs(layer.key_layout, layer.value_layout, stored, wide)


def pairs_of(stored: LayerArrays) -> dict[str, Tensor]:
    """The arrays that hold pairs, by name."""
    found = {name: getattr(stored, name) for name in PAIRS}
    return {name: array for name, array in found.items() if array is not None}


def open_run(
    run: Run, arrays: LayerArrays, rows: Tensor | None, lengths: Tensor | None
) -> RunSlots:
    """What the rows hold for one run of heads.

    Parameters
    ----------
    run
        Which heads.
    arrays
        Of the layer.
    rows
        [B] int64; ``None``: all rows.
    lengths
        [B], where rows of length 0 may hold anything: they are emptied first.
    """
    return _opened(run.layer, arrays.of_run(run), rows, lengths)


def _opened(
    layer: LayerConfig, stored: LayerArrays, rows: Tensor | None, lengths: Tensor | None
) -> RunSlots:
    small = {name: getattr(stored, name) for name in ("scores", "positions", "H", "z", "history")}
    if rows is not None:
        small = {n: None if x is None else x.index_select(0, rows) for n, x in small.items()}
    slots = RunSlots(layer, stored, rows, **small)
    if lengths is not None:
        slots.clear(lengths == 0)
    return slots


@functools.lru_cache(maxsize=256)
def _firsts(capacities: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(capacities[:-1])], device=device)


def open_layer(
    layer: LayerConfig, arrays: LayerArrays, rows: Tensor | None, lengths: Tensor | None
) -> RunSlots:
    """`open_run` of all heads of a layer, whose slots are as those of one head."""
    slots = _opened(layer, arrays.as_one_head(), rows, lengths)
    slots.whole, slots.runs = arrays, layer.runs
    return slots


def _along(slot: Tensor, stored: Tensor) -> Tensor:
    return slot if stored.ndim == 3 else slot.unsqueeze(3).expand(-1, -1, -1, stored.shape[3])


def _take(array: Tensor, columns: Tensor) -> Tensor:
    """``array[b, h, columns]`` of [B, heads, N] or [B, heads, N, D]."""
    return array.gather(2, _along(columns, array))
