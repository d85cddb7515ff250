"""Drawn caches: shapes, policies, chunks and masks; the numbers come from a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st

import less_cache as lc
from less_cache.backends import reference
from less_cache.policies import Gain, Start
from tests.conformance.cases import BackendCase
from tests.helpers import random_maps

CLOSE_SCORES = 2e-5
CLOSE_SHARES = 2e-5
FULL_CAPACITY = 40


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A cache and what is appended to it."""

    config: lc.CacheConfig
    kind: str
    batch: int
    chunks: tuple[tuple[int, str], ...]
    seed: int

    def maps(self, case: BackendCase) -> lc.FeatureMaps | None:
        return case.rounded_maps(random_maps(self.config, self.kind, self.seed))

    def appends(self, case: BackendCase) -> Iterator[tuple[int, list[np.ndarray], Any]]:
        """Layer, [q, k, v] as the case's dtype has them, and the mask, call by call.

        Padding holds NaN and infinity: nothing of it may be seen anywhere.
        """
        rng = np.random.default_rng(self.seed)
        config = self.config
        heads = (config.query_heads, config.kv_heads, config.kv_heads)
        for tokens, padding in self.chunks:
            mask = draw_mask(rng, padding, self.batch, tokens)
            for layer in range(config.num_layers):
                arrays = []
                for number in heads:
                    shape = (self.batch, number, tokens, config.head_dim)
                    array = case.rounded(rng.normal(size=shape))
                    if mask is not None:
                        garbage = rng.choice([np.nan, np.inf, -np.inf], size=shape)
                        array = np.where(mask[:, None, :, None], array, garbage)
                    arrays.append(array)
                yield layer, arrays, mask


def draw_mask(rng: np.random.Generator, padding: str, batch: int, tokens: int) -> np.ndarray | None:
    if padding == "none":
        return None
    counts = rng.integers(0, tokens + 1, size=(batch, 1))
    column = np.arange(tokens)[None, :]
    if padding == "left":
        return column >= tokens - counts
    if padding == "right":
        return column < counts
    if padding == "rows":
        return np.broadcast_to(rng.random((batch, 1)) < 0.5, (batch, tokens)).copy()
    if padding == "nothing":
        return np.zeros((batch, tokens), dtype=bool)
    return rng.random((batch, tokens)) < 0.6


PADDINGS = ("none", "none", "left", "right", "holes", "rows", "nothing")


@st.composite
def policies(draw: st.DrawFn, name: str, capacity: int) -> lc.Policy:
    """A policy of that name that `capacity` has room for."""
    sinks = draw(st.integers(0, 2))
    recent = draw(st.integers(0, capacity - 1 - sinks))
    maybe = draw(st.sampled_from([None, recent]))
    if name == "FullCache":
        return lc.FullCache()
    if name == "SinkWindow":
        return lc.SinkWindow(sinks=sinks, recent=recent)
    if name == "KeyNorm":
        return lc.KeyNorm(sinks=sinks, recent=recent)
    if name == "H2O":
        return lc.H2O(sinks=sinks, recent=maybe)
    if name == "DecayedH2O":
        factor = draw(st.sampled_from([0.3, 0.9, 1.0]))
        return lc.DecayedH2O(sinks=sinks, recent=maybe, factor=factor)
    if name == "TOVA":
        return lc.TOVA(recent=max(1, recent))
    if name == "ObservationWindow":
        window = draw(st.integers(1, 9))
        neighbours = draw(st.sampled_from([1, 3, 5]))
        return lc.ObservationWindow(sinks=sinks, recent=maybe, window=window, neighbours=neighbours)
    return lc.Scissorhands(sinks=sinks, recent=maybe, window=draw(st.integers(1, 9)))


@st.composite
def scenarios(draw: st.DrawFn, case: BackendCase, names: tuple[str, ...] = ()) -> Scenario:
    """Any cache that `case` takes, with one to six appends."""
    names = tuple(name for name in names or case.policies if name in case.policies)
    kv_heads = draw(st.integers(1, 3))
    group = draw(st.integers(1, case.max_group))
    num_layers = draw(st.integers(1, 2))
    capacities, chosen = [], []
    for _ in range(num_layers):
        name = draw(st.sampled_from(names))
        least = FULL_CAPACITY if name == "FullCache" else draw(st.integers(3, 9))
        # Heads differ in about half of the layers: some alone, some in runs.
        more = st.sampled_from([0, 0, 1, 6])
        by_head = draw(st.booleans())
        extra = [draw(more) if by_head else 0 for _ in range(kv_heads)]
        capacities.append([least + count for count in extra])
        chosen.append(draw(policies(name, least)))
    tokens = st.one_of(st.just(1), st.integers(2, 12))
    chunks = draw(
        st.lists(st.tuples(tokens, st.sampled_from(PADDINGS)), min_size=1, max_size=6).filter(
            lambda chunks: sum(count for count, _ in chunks) <= FULL_CAPACITY
        )
    )
    config = lc.CacheConfig(
        num_layers=num_layers,
        query_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from(case.head_dims)),
        capacity=capacities,
        policy=chosen,
        rank=[draw(st.integers(0, case.max_rank)) for _ in range(num_layers)],
        softcap=draw(st.sampled_from([None, 3.0])) if case.softcap else None,
        dtype=case.dtype,
    )
    return Scenario(
        config=config,
        kind=draw(st.sampled_from(case.kinds)),
        batch=draw(st.integers(1, 4)),
        chunks=tuple(chunks),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


class CloseCall:
    """Whether the oracle has met a choice that rounding in float32 could turn."""

    def __init__(self) -> None:
        self.met = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Look at every victim, and at every bit of a history, that the oracle decides on."""
        victim, update = reference.victim, lc.Scissorhands.update

        def watched_victim(
            xp: Any, policy: lc.Policy, scores: np.ndarray, positions: np.ndarray, seen: int
        ) -> int:
            slot = victim(xp, policy, scores, positions, seen)
            free = (positions >= policy.sinks) & (positions < seen - policy.protected_recent)
            free[slot] = False
            # Counts and positions are exact in any precision; ties among them are no accident.
            rounds = policy.gains is Gain.SUM or policy.starts is Start.KEY_NORM
            if rounds and free.any():
                gap = scores[free].min() - scores[slot]
                self.met |= bool(gap < CLOSE_SCORES * (1 + abs(scores[slot])))
            return slot

        def watched_update(
            policy: lc.Scissorhands,
            xp: Any,
            scores: np.ndarray,
            history: np.ndarray,
            probabilities: np.ndarray,
            visible: np.ndarray,
        ) -> Any:
            attended = visible.sum(1)
            distance = np.abs(probabilities.mean(0) * attended[:, None] - 1.0)
            relevant = visible & (attended > 1)[:, None]
            self.met |= bool((distance[relevant] < CLOSE_SHARES).any())
            return update(policy, xp, scores, history, probabilities, visible)

        with (
            mock.patch.object(reference, "victim", watched_victim),
            mock.patch.object(lc.Scissorhands, "update", watched_update),
        ):
            yield
