"""The one place where the PyTorch backend reads and writes what is stored of a call's rows.

Keys and values are kept in the dtype of storing and come out in the dtype of computing. The small
arrays (scores, positions, history, H, z) of the rows in question are at hand as dense tensors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...arrays import EMPTY, LayerArrays
from ...layer_config import LayerConfig, Run


@dataclass
class RunSlots:
    """What the rows of a call hold for one run of heads of equal capacity C.

    Parameters
    ----------
    layer
        The run's heads as a layer of their own.
    stored
        All rows of the pool, [P, heads, C, ...]; views of the layer's arrays.
    rows
        [B] int64, which of them the call is about; ``None``: all, in order.
    scores, positions, history, H, z
        Of those rows, [B, heads, ...]: views of `stored` where `rows` is ``None``, else copies,
        which `close` puts back.
    """

    layer: LayerConfig
    stored: LayerArrays
    rows: Tensor | None
    scores: Tensor
    positions: Tensor
    H: Tensor
    z: Tensor
    history: Tensor | None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of computing."""
        return self.scores.dtype

    def close(self) -> None:
        """Put the small arrays back to where the pool keeps them."""
        if self.rows is None:
            return
        for name in ("scores", "positions", "H", "z", "history"):
            array = getattr(self, name)
            if array is not None:
                getattr(self.stored, name).index_copy_(0, self.rows, array)

    def products(self, queries: Tensor) -> Tensor:
        """q·k of queries [B, heads, M, D] with every stored key: [B, heads, M, C]."""
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
        """Σ weight · v over every stored value: [B, heads, M, D] from [B, heads, M, C]."""
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
        return (
            self._at(self.stored.keys, slot).to(self.wide),
            self._at(self.stored.values, slot).to(self.wide),
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
        for stored, new in ((self.stored.keys, k), (self.stored.values, v)):
            value = new.to(stored.dtype)
            if incoming is not None:
                value = torch.where(incoming.unsqueeze(3), value, self._at(stored, slot))
            if self.rows is None:
                stored.scatter_(2, _along(slot, stored), value)
            else:
                stored[self._places(slot)] = value.squeeze(2)

    def read(self) -> tuple[Tensor, Tensor]:
        """All stored keys and values of the rows, [B, heads, C, D], as they are stored."""
        return self._chosen(self.stored.keys), self._chosen(self.stored.values)

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Store these in place of all, [B, heads, C, D]."""
        for stored, new in ((self.stored.keys, keys), (self.stored.values, values)):
            if self.rows is None:
                stored.copy_(new)
            else:
                stored.index_copy_(0, self.rows, new.to(stored.dtype))

    def clear(self, fresh: Tensor) -> None:
        """Make the rows that `fresh` [B] names empty, whatever they held."""
        if fresh.device.type == "cpu":
            # There is nothing to wait for, and mostly nothing to do.
            chosen = fresh.nonzero().flatten()
            if not len(chosen):
                return
            pool = chosen if self.rows is None else self.rows[chosen]
            for array in (self.stored.keys, self.stored.values):
                array[pool] = 0
            for array in (self.scores, self.H, self.z, self.history):
                if array is not None:
                    array[chosen] = 0
            self.positions[chosen] = EMPTY
            return
        shape = (-1, 1, 1, 1)
        keys, values = self.read()
        self.replace(*(x.masked_fill(fresh.view(shape), 0) for x in (keys, values)))
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
        return range(self.scores.shape[0]) if self.rows is None else self.rows.tolist()

    def _chosen(self, stored: Tensor) -> Tensor:
        return stored if self.rows is None else stored.index_select(0, self.rows)

    def _places(self, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = torch.arange(slot.shape[1], device=slot.device)
        if self.rows is None:
            raise AssertionError("only rows of a pool are addressed one by one")
        return self.rows.unsqueeze(1), heads, slot.squeeze(2)

    def _at(self, stored: Tensor, slot: Tensor) -> Tensor:
        if self.rows is None:
            return stored.gather(2, _along(slot, stored))
        return stored[self._places(slot)].unsqueeze(2)


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
    stored = arrays.of_run(run)
    small = {name: getattr(stored, name) for name in ("scores", "positions", "H", "z", "history")}
    if rows is not None:
        small = {n: None if x is None else x.index_select(0, rows) for n, x in small.items()}
    slots = RunSlots(run.layer, stored, rows, **small)
    if lengths is not None:
        slots.clear(lengths == 0)
    return slots


def _along(slot: Tensor, stored: Tensor) -> Tensor:
    return slot.unsqueeze(3).expand(-1, -1, -1, stored.shape[3])
