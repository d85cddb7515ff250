"""`LayerConfig`: what one layer's cache is, and how its heads share a row's slots."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from .dtypes import DTYPE_BYTES
from .policies import Policy
from .quantization import CodeLayout, Quantization, code_layout

POSITION_BYTES = {"int32": 4, "int16": 2}
LENGTH_BYTES = 4
HISTORY_BYTES = 8
SCALE_BYTES = 2


@dataclass(frozen=True)
class Run:
    """KV heads side by side that have the same number of slots, and so are one dense array.

    Parameters
    ----------
    first, heads
        The first KV head, and how many.
    offset
        Where their slots begin among a row's.
    layer
        These heads as a layer of their own.
    """

    first: int
    heads: int
    offset: int
    layer: LayerConfig

    @property
    def kv_heads(self) -> slice:
        """These among the layer's KV heads."""
        return slice(self.first, self.first + self.heads)

    @property
    def query_heads(self) -> slice:
        """The query heads that they serve."""
        group = self.layer.group
        return slice(self.first * group, (self.first + self.heads) * group)

    @property
    def slots(self) -> slice:
        """Their slots in a row's."""
        return slice(self.offset, self.offset + self.layer.slots)


@dataclass(frozen=True)
class LayerConfig:
    """What one layer's cache is: everything a backend needs to know besides the arrays.

    A row's slots lie flat, [N] with N = Σ C_h, heads one after another.

    Parameters
    ----------
    query_heads, kv_heads, head_dim
        Hq, Hkv, D.
    capacities
        C_h, the slots of each KV head.
    policies
        Of each KV head. They differ in `recent` alone, which follows the capacity.
    rank, scale, softcap, dtype, state_dtype, quantization
        As of `CacheConfig`.
    position_dtype
        ``"int16"`` of coded slots where a sequence has no more tokens than that can count.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    capacities: tuple[int, ...]
    policies: tuple[Policy, ...]
    rank: int
    scale: float
    softcap: float | None
    dtype: str
    state_dtype: str
    quantization: Quantization | None = None
    position_dtype: str = "int32"

    @cached_property
    def group(self) -> int:
        """G, the query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def policy(self) -> Policy:
        """The rule that all heads follow, with the first head's numbers."""
        return self.policies[0]

    @cached_property
    def slots(self) -> int:
        """N, the slots of all heads together."""
        return sum(self.capacities)

    @property
    def is_uniform(self) -> bool:
        """Whether all heads have the same number of slots."""
        return len(set(self.capacities)) == 1

    @property
    def capacity(self) -> int:
        """C, where all heads have the same number of slots.

        Raises
        ------
        ValueError
            If they have not: look at `capacities` or `runs`.
        """
        if not self.is_uniform:
            raise ValueError(f"capacity: differs by head: {self.capacities}")
        return self.capacities[0]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each head's slots begin."""
        return tuple(sum(self.capacities[:head]) for head in range(self.kv_heads))

    def head_slots(self, head: int) -> slice:
        """One KV head's slots in a row's."""
        start = self.offsets[head]
        return slice(start, start + self.capacities[head])

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The heads, grouped where equal ones stand side by side."""
        runs = []
        first = 0
        for head in range(1, self.kv_heads + 1):
            if head < self.kv_heads and self.capacities[head] == self.capacities[first]:
                continue
            runs.append(self._run(first, head - first))
            first = head
        return tuple(runs)

    def _run(self, first: int, heads: int) -> Run:
        if heads == self.kv_heads:
            return Run(0, heads, 0, self)
        part = dataclasses.replace(
            self,
            query_heads=heads * self.group,
            kv_heads=heads,
            capacities=self.capacities[first : first + heads],
            policies=self.policies[first : first + heads],
        )
        return Run(first, heads, self.offsets[first], part)

    @cached_property
    def score_dtype(self) -> str:
        """Scores and sums are float32, or float64 where keys and values are."""
        return "float64" if self.dtype == "float64" else "float32"

    @cached_property
    def keeps_scores(self) -> bool:
        """Whether slots hold scores: coded ones do not where a position tells its pair's."""
        return self.quantization is None or not self.policy.by_age

    @cached_property
    def key_layout(self) -> CodeLayout | None:
        """How a stored key's codes lie; ``None`` where keys are stored as they are."""
        q = self.quantization
        return None if q is None else code_layout(q.transform, q.key_bits, self.head_dim)

    @cached_property
    def value_layout(self) -> CodeLayout | None:
        """How a stored value's codes lie; ``None`` where values are stored as they are."""
        q = self.quantization
        return None if q is None else code_layout(q.transform, q.value_bits, self.head_dim)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of one head: key, value, their scales, score, position, history."""
        history = HISTORY_BYTES if self.policy.history_window else 0
        pair = 2 * self.head_dim * DTYPE_BYTES[self.dtype]
        if self.key_layout is not None and self.value_layout is not None:
            pair = self.key_layout.nbytes + self.value_layout.nbytes + 2 * SCALE_BYTES
        score = DTYPE_BYTES[self.score_dtype] if self.keeps_scores else 0
        return pair + score + POSITION_BYTES[self.position_dtype] + history

    @property
    def low_rank_bytes(self) -> int:
        """Bytes of H and z of one head."""
        return self.rank * (self.head_dim + 1) * DTYPE_BYTES[self.state_dtype]

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes that one sequence takes in this layer."""
        return self.slots * self.slot_bytes + self.fixed_bytes

    @property
    def fixed_bytes(self) -> int:
        """What of `bytes_per_sequence` does not grow with the slots: H and z, and the length."""
        return self.kv_heads * self.low_rank_bytes + LENGTH_BYTES
