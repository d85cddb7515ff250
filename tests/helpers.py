"""Inputs, maps and comparisons that several test files need."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

import less_cache as lc
from less_cache.layer_config import LayerConfig
from less_cache.layer_maps import tensor_shapes

POLICIES = (
    lc.FullCache(),
    lc.SinkWindow(sinks=2),
    lc.H2O(),
    lc.TOVA(),
    lc.Scissorhands(window=5),
    lc.KeyNorm(sinks=1, recent=2),
    lc.DecayedH2O(factor=0.9),
    lc.ObservationWindow(window=4, neighbours=3),
)
"""One of each registered policy, with numbers that small caches have room for."""


def policy_id(policy: lc.Policy) -> str:
    return type(policy).__name__


def small_config(**changes: Any) -> lc.CacheConfig:
    """Two layers of two KV heads, six slots and rank 2, but for `changes`."""
    parameters: dict[str, Any] = {
        "num_layers": 2,
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 4,
        "capacity": 6,
        "policy": lc.H2O(),
        "rank": 2,
    }
    parameters.update(changes)
    return lc.CacheConfig(**parameters)


def random_maps(
    config: lc.CacheConfig, kind: str = "exp", seed: int = 0, hidden: int = 6
) -> lc.FeatureMaps | None:
    """Maps whose state weighs about as much as the pairs do; ``None`` for rank 0."""
    if not config.has_state:
        return None
    rng = np.random.default_rng(seed)
    layers: list[dict[str, np.ndarray] | None] = []
    for rank in config.ranks:
        if not rank:
            layers.append(None)
            continue
        shapes = tensor_shapes(
            kind,
            query_heads=config.query_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            hidden=hidden,
            rank=rank,
        )
        tensors = {name: rng.normal(size=shape) * 0.5 for name, shape in shapes.items()}
        if kind == "exp":
            tensors["psi_b"] -= 1.0
        layers.append({name: value.astype(np.float32) for name, value in tensors.items()})
    return lc.FeatureMaps.from_tensors(layers)


def random_inputs(
    config: lc.CacheConfig, batch: int, tokens: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v in float64."""
    heads = (config.query_heads, config.kv_heads, config.kv_heads)
    q, k, v = (rng.normal(size=(batch, h, tokens, config.head_dim)) for h in heads)
    return q, k, v


def torch_inputs(
    config: lc.CacheConfig, batch: int, tokens: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of the config's dtype."""
    dtype = getattr(torch, config.dtype)
    arrays = random_inputs(config, batch, tokens, np.random.default_rng(seed))
    q, k, v = (torch.as_tensor(array).to(dtype) for array in arrays)
    return q, k, v


def as_numpy(array: Any) -> np.ndarray:
    """float64 for numbers with a point, whatever the library; the dtype's own for integers."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.double() if array.is_floating_point() else array).numpy()
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def bits_of(state: lc.CacheState) -> list[dict[str, bytes]]:
    """Every array of a state as bytes."""
    return [
        {
            name: (
                array.detach().cpu().contiguous().view(torch.uint8).numpy()
                if isinstance(array, torch.Tensor)
                else np.ascontiguousarray(array)
            ).tobytes()
            for name, array in layer.arrays().items()
        }
        for layer in state.layers
    ]


@dataclasses.dataclass
class Held:
    """One layer's state in NumPy, the slots in order of position, so that backends compare."""

    positions: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    scores: np.ndarray | None
    history: np.ndarray | None
    H: np.ndarray
    z: np.ndarray
    length: np.ndarray

    def sums(self) -> dict[str, np.ndarray]:
        """What rounding may change: scores where slots keep them, H and z."""
        found = {"scores": self.scores, "H": self.H, "z": self.z}
        return {name: array for name, array in found.items() if array is not None}


def held_by(layer: lc.LayerState, config: LayerConfig) -> Held:
    """What a layer holds, heads apart: [B, Hkv, most slots], empty slots zero and put first."""
    arrays = {name: as_numpy(array) for name, array in layer.arrays().items()}
    batch, most = arrays["positions"].shape[0], max(config.capacities)
    small = (batch, config.kv_heads, most)
    found = {
        name: np.zeros(small if array.ndim == 2 else (*small, array.shape[2]), array.dtype)
        for name, array in arrays.items()
        if name in ("keys", "values", "scores", "positions", "history")
    }
    found["positions"] -= 1
    for head, capacity in enumerate(config.capacities):
        slots = config.head_slots(head)
        positions = arrays["positions"][:, slots]
        order = np.argsort(positions, axis=1, kind="stable")
        for name, into in found.items():
            array = arrays[name][:, slots]
            index = order if array.ndim == 2 else order[..., None]
            taken = np.take_along_axis(array, index, 1)
            empty = np.take_along_axis(positions, order, 1) < 0
            empty = empty if array.ndim == 2 else empty[..., None]
            blank = -1 if name == "positions" else 0
            into[:, head, most - capacity :] = np.where(empty, blank, taken)
    return Held(
        **{name: found[name] for name in ("positions", "keys", "values")},
        scores=found.get("scores"),
        history=found.get("history"),
        H=arrays["H"],
        z=arrays["z"],
        length=arrays["length"],
    )


def assert_close(actual: np.ndarray, expected: np.ndarray, bound: float, what: str) -> None:
    """Within `bound`, absolutely below 1 and relatively above."""
    assert np.isfinite(actual).all(), f"{what}: not finite"
    error = np.abs(actual - expected) / np.maximum(1.0, np.abs(expected))
    worst = float(error.max()) if error.size else 0.0
    assert worst <= bound, f"{what}: off by {worst:.3g}, at most {bound:.3g} is allowed"


def assert_same_state(actual: Held, expected: Held, bound: float) -> None:
    """Equal sets, pairs and lengths; scores, H and z within `bound`."""
    np.testing.assert_array_equal(actual.positions, expected.positions)
    np.testing.assert_array_equal(actual.length, expected.length)
    np.testing.assert_array_equal(actual.keys, expected.keys)
    np.testing.assert_array_equal(actual.values, expected.values)
    if expected.history is not None:
        np.testing.assert_array_equal(actual.history, expected.history)
    assert_close_sums(actual, expected, bound)


def assert_close_sums(actual: Held, expected: Held, bound: float) -> None:
    """Scores, H and z within `bound`."""
    assert actual.sums().keys() == expected.sums().keys()
    for name, array in expected.sums().items():
        assert_close(actual.sums()[name], array, bound, name)


def tensors_of(kind="paper", **sizes):
    """One layer's parameters by name, random."""
    shapes = {"query_heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 6, "rank": 2, **sizes}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in tensor_shapes(kind, **shapes).items()
    }
