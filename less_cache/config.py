"""`CacheConfig`: the shapes of a model's cache, its budget and its policy."""

from __future__ import annotations

import dataclasses
import importlib
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ._checks import check_int, check_real
from .arrays import MAX_SHORT_TOKENS, MAX_TOKENS, Page, page_of
from .dtypes import DTYPE_BYTES, default_state_dtype, dtype_name, state_dtype_name
from .layer_config import LayerConfig
from .policies import Policy, Start, check_registered, policy_from_dict
from .quantization import Quantization

FORMAT_VERSION = 1

MOST_PARTS = 2**16
"""Layers, and heads of a layer: each takes memory in the config itself."""

Slots: TypeAlias = "int | float | str"
"""A number of slots; or a share of the model's longest sequence, 0.05 or "5%"."""

Codes: TypeAlias = "Quantization | None"
"""In how many bits pairs are stored; ``None``: as they are."""


@dataclass(frozen=True)
class CacheConfig:
    """The shapes, the policy and the budget of a model's cache.

    Parameters
    ----------
    num_layers
        Layers that have a cache.
    query_heads, kv_heads
        Heads of the queries, and of the keys and values; the first a multiple of the second.
    head_dim
        D, the size of a head.
    capacity
        C, the pairs each head holds, the current token's included; or a share of `max_positions`,
        as a float in (0, 1] or like ``"5%"``, rounded up. One for all; or one a layer; or, in
        place of a layer's, one a KV head of that layer.
    policy
        Which pair leaves when the cache is full; or one policy for each layer.
    rank
        R, the rows of the low-rank state; 0 runs the policy alone. One for all, or one a layer.
    hidden
        Hidden size of the feature maps; ``None`` takes whatever the maps have.
    max_positions
        The model's longest sequence; needed only where `capacity` is a share. Up to 32,768, coded
        slots have positions of 16 bits, and no sequence may be longer than that.
    scale
        Factor on q·k before the softmax. Default: 1 / sqrt(head_dim).
    softcap
        Where given, logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
    dtype
        Of keys and values: float64, float32, float16 or bfloat16, or a dtype of torch or NumPy.
    state_dtype
        Of H and z: float32 or float64. They are sums over the whole past, for which 16 bits do
        not do. Default: float32 (float64 where `dtype` is).
    quantization
        In how many bits pairs are stored; ``None``: in `dtype`. One for all, or one a layer.

    Raises
    ------
    ValueError, TypeError
        If a number is out of range, or the capacity too small for the policy.

    Notes
    -----
    A config's attributes are the parameters, with every number filled in: `capacity` and `policy`
    one for all where all layers and heads agree, else one a layer, else one a head of each layer;
    `rank` and `quantization` one for all where all layers agree, else one a layer.

    Examples
    --------
    >>> import less_cache as lc
    >>> config = lc.CacheConfig(2, 8, 2, 64, capacity=[32, [16, 128]], policy=lc.SinkWindow())
    >>> config.capacities
    ((32, 32), (16, 128))
    >>> config.replace(rank=[0, 8]).ranks
    (0, 8)
    """

    num_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    capacity: Slots | Sequence[Slots | Sequence[Slots]]
    policy: Policy | Sequence[Policy]
    rank: int | Sequence[int] = 8
    hidden: int | None = None
    max_positions: int | None = None
    scale: float | None = None
    softcap: float | None = None
    dtype: Any = "float32"
    state_dtype: Any = None
    quantization: Codes | Sequence[Codes] = None
    # What was asked for, and what came of it: not part of what a config is.
    _asked: dict[str, Any] = field(init=False, repr=False, compare=False)
    _layers: tuple[LayerConfig, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        asked = {name: getattr(self, name) for name in PARAMETERS}
        for name in ("num_layers", "query_heads", "kv_heads"):
            asked[name] = check_int(name, asked[name], minimum=1, maximum=MOST_PARTS)
        asked["head_dim"] = check_int("head_dim", self.head_dim, minimum=1)
        for name in ("hidden", "max_positions"):
            if asked[name] is not None:
                asked[name] = check_int(name, asked[name], minimum=1)
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"query_heads: got {self.query_heads}, "
                f"expected a multiple of kv_heads = {self.kv_heads}"
            )
        for name in ("scale", "softcap"):
            if asked[name] is not None:
                asked[name] = check_real(name, asked[name], above=0.0)
        asked["dtype"] = dtype_name(self.dtype)
        if self.state_dtype is not None:
            asked["state_dtype"] = state_dtype_name(self.state_dtype)
        ranks = _per_layer("rank", self.rank, asked["num_layers"])
        asked["rank"] = collapsed(tuple(check_int("rank", rank, minimum=0) for rank in ranks))
        codes = _per_layer("quantization", self.quantization, asked["num_layers"])
        asked["quantization"] = collapsed(tuple(map(_checked_codes, codes)))
        asked["capacity"] = _plain(self.capacity)
        asked["policy"] = _plain(self.policy)
        layers = tuple(_resolve_layers(asked))
        # Two spellings of the same cache are to compare equal and to hash alike.
        resolved = {
            **asked,
            "capacity": collapsed(tuple(collapsed(layer.capacities) for layer in layers)),
            "policy": collapsed(tuple(collapsed(layer.policies) for layer in layers)),
            "scale": layers[0].scale,
            "state_dtype": layers[0].state_dtype,
        }
        for name, value in (*resolved.items(), ("_asked", asked), ("_layers", layers)):
            object.__setattr__(self, name, value)

    @property
    def capacities(self) -> tuple[tuple[int, ...], ...]:
        """C of each KV head of each layer."""
        return tuple(layer.capacities for layer in self._layers)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policy of each layer, with its first head's numbers."""
        return tuple(layer.policy for layer in self._layers)

    @property
    def ranks(self) -> tuple[int, ...]:
        """R of each layer."""
        return tuple(layer.rank for layer in self._layers)

    @property
    def quantizations(self) -> tuple[Quantization | None, ...]:
        """In how many bits each layer's pairs are stored."""
        return tuple(layer.quantization for layer in self._layers)

    @property
    def has_state(self) -> bool:
        """Whether any layer has a low-rank state, and so needs feature maps."""
        return any(self.ranks)

    @property
    def has_codes(self) -> bool:
        """Whether any layer's pairs are coded."""
        return any(codes is not None for codes in self.quantizations)

    @property
    def group(self) -> int:
        """G, the query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """What a backend needs to know of each layer."""
        return self._layers

    def layer(self, index: int) -> LayerConfig:
        """What a backend needs to know of layer `index`.

        Raises
        ------
        ValueError
            If there is no such layer.
        """
        check_int("layer", index, minimum=0, maximum=self.num_layers - 1)
        return self._layers[index]

    def page(self, layer: int) -> Page:
        """How a row of layer `layer` lies in one buffer: for engines that own the memory.

        Raises
        ------
        ValueError
            If there is no such layer.
        """
        return page_of(self.layer(layer))

    def bytes_per_sequence(self, dtype: Any = None) -> int:
        """Bytes that one sequence takes in all layers together, whatever its length.

        Parameters
        ----------
        dtype
            Of keys and values; default: the config's own.
        """
        config = self if dtype is None else self.with_dtype(dtype)
        return sum(layer.bytes_per_sequence for layer in config.layers)

    def full_cache_bytes(self, tokens: int, dtype: Any = None) -> int:
        """Bytes of the keys and values of every token in the same layers, were all kept.

        Parameters
        ----------
        tokens
            Of one sequence.
        dtype
            Of keys and values; default: the config's own.
        """
        number = DTYPE_BYTES[self.dtype if dtype is None else dtype_name(dtype)]
        return 2 * self.num_layers * self.kv_heads * self.head_dim * tokens * number

    def with_dtype(self, dtype: Any) -> CacheConfig:
        """The same cache for keys and values of another dtype."""
        name = dtype_name(dtype)
        return self if name == self.dtype else self.replace(dtype=name)

    def replace(self, **changes: Any) -> CacheConfig:
        """A copy with some parameters changed.

        What was left to the library, or given as a share, is worked out anew: ``recent=None`` for
        the new capacity, a share for the new `max_positions`, `state_dtype` for the new dtype.
        """
        known = self._asked
        if unknown := sorted(set(changes) - set(known)):
            raise TypeError(
                f"{unknown[0]}: no parameter of CacheConfig; expected some of {[*known]}"
            )
        return CacheConfig(**{**known, **changes})

    def baseline_plus(self) -> CacheConfig:
        """The sparse cache to compare with: rank 0, the low-rank state's bytes spent on slots.

        Each head's extra slots are rounded up, so that the comparison never favours the low-rank
        state.
        """
        capacities = [
            [c + math.ceil(layer.low_rank_bytes / layer.slot_bytes) for c in layer.capacities]
            for layer in self.layers
        ]
        return self.replace(capacity=capacities, rank=0)

    def shard(self, rank: int, world: int) -> CacheConfig:
        """The part of the cache that one of `world` tensor-parallel processes holds.

        Heads are dealt out in order. Where there are more processes than KV heads, several hold
        the same KV head, each for its own query heads.

        Parameters
        ----------
        rank
            Which process, from 0; not the low-rank state's rank.
        world
            How many there are.

        Raises
        ------
        ValueError
            If the heads cannot be dealt out evenly.
        """
        heads = kv_shard(self.query_heads, self.kv_heads, rank, world)
        capacities = [list(layer.capacities[heads]) for layer in self.layers]
        return self.replace(
            query_heads=self.query_heads // world,
            kv_heads=heads.stop - heads.start,
            capacity=capacities,
            scale=self.scale,
        )

    @classmethod
    def for_budget(
        cls,
        *,
        bytes_per_sequence: int,
        policy: Policy | Sequence[Policy],
        **parameters: Any,
    ) -> CacheConfig:
        """The config with the largest capacity, equal in all heads, that keeps within a budget.

        Parameters
        ----------
        bytes_per_sequence
            What one sequence may take in all layers together.
        policy, **parameters
            As of `CacheConfig`, without `capacity`.

        Raises
        ------
        ValueError
            If the budget is too small for the policy's least capacity.
        """
        check_int("bytes_per_sequence", bytes_per_sequence, minimum=1)
        if "capacity" in parameters:
            raise TypeError("capacity: for_budget chooses it; leave it out")
        num_layers = check_int("num_layers", parameters.get("num_layers"), minimum=1)
        least = max(
            entry.sinks + (1 if entry.recent is None else entry.recent + 1)
            for entry in map(_checked_policy, _per_layer("policy", policy, num_layers))
        )
        smallest = cls(capacity=least, policy=policy, **parameters)
        spare = bytes_per_sequence - smallest.bytes_per_sequence()
        if spare < 0:
            raise ValueError(
                f"bytes_per_sequence: got {bytes_per_sequence}, but the least that this policy and "
                f"rank take is {smallest.bytes_per_sequence()}"
            )
        slot = sum(layer.kv_heads * layer.slot_bytes for layer in smallest.layers)
        return cls(capacity=least + spare // slot, policy=policy, **parameters)

    @classmethod
    def from_model(
        cls,
        model_config: Any,
        *,
        capacity: Slots | Sequence[Slots | Sequence[Slots]] | None = None,
        policy: Policy | Sequence[Policy],
        rank: int | Sequence[int] = 8,
        **parameters: Any,
    ) -> CacheConfig:
        """The config for a transformers model; layers with a sliding window are not counted.

        Parameters
        ----------
        model_config
            The model's configuration; only its attributes are read.
        capacity, policy, rank, **parameters
            As of `CacheConfig`. Without a capacity: the model's longest sequence.

        Raises
        ------
        ValueError
            If the configuration lacks a shape, or every layer has a sliding window.
        """
        # The one look upward: what such a configuration means is the integrations' knowledge.
        reader = importlib.import_module(".integrations.introspection", __package__)
        shapes = reader.model_shapes(model_config)
        shapes.update(parameters)
        if capacity is None:
            capacity = shapes.get("max_positions")
            if capacity is None:
                raise ValueError(
                    "capacity: needed, since the model's configuration names no length"
                )
        return cls(capacity=capacity, policy=policy, rank=rank, **shapes)

    def to_dict(self) -> dict[str, Any]:
        """What was asked for, as JSON-ready data; `from_dict` reads it back.

        Raises
        ------
        ValueError
            If a policy is a user's own that nobody registered.
        """
        data = dict(self._asked)
        policies = _per_layer("policy", data["policy"], self.num_layers)
        for policy in policies:
            check_registered(policy)
        data["policy"] = [policy.to_dict() for policy in policies]
        data["quantization"] = codes_data(data["quantization"])
        return {"format": FORMAT_VERSION, **data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CacheConfig:
        """Read a config back from `to_dict`'s data.

        Raises
        ------
        ValueError, TypeError
            If the data is of another format, or has unknown or missing fields.
        """
        if not isinstance(data, dict):
            raise TypeError(f"config: got {type(data).__name__}, expected a dict of its fields")
        fields = dict(data)
        version = fields.pop("format", None)
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(f"config: format: got {version!r}, expected {FORMAT_VERSION}")
        # Older files know of no codes.
        fields.setdefault("quantization", None)
        if wrong := sorted(set(fields) ^ set(PARAMETERS)):
            raise ValueError(f"config: unknown or missing field(s) {wrong}")
        if not isinstance(fields["policy"], list):
            found = type(fields["policy"]).__name__
            raise TypeError(f"config: policy: got {found}, expected a list of one a layer")
        fields["policy"] = [policy_from_dict(policy) for policy in fields["policy"]]
        codes = fields["quantization"]
        fields["quantization"] = (
            [*map(_read_codes, codes)] if isinstance(codes, list) else _read_codes(codes)
        )
        return cls(**fields)


PARAMETERS = tuple(entry.name for entry in dataclasses.fields(CacheConfig) if entry.init)
"""What a config is made of."""


def kv_shard(query_heads: int, kv_heads: int, rank: int, world: int) -> slice:
    """The KV heads that process `rank` of `world` holds.

    Raises
    ------
    ValueError
        If the heads cannot be dealt out evenly, or there is no such process.
    """
    check_int("world", world, minimum=1)
    check_int("rank", rank, minimum=0, maximum=world - 1)
    if query_heads % world or (kv_heads % world and world % kv_heads):
        raise ValueError(
            f"world: got {world}, expected a divisor of query_heads = {query_heads} that divides "
            f"kv_heads = {kv_heads} or is a multiple of it"
        )
    first = rank * kv_heads // world
    return slice(first, first + max(1, kv_heads // world))


def _resolve_layers(asked: dict[str, Any]) -> list[LayerConfig]:
    num_layers, kv_heads = asked["num_layers"], asked["kv_heads"]
    dtype, scale = asked["dtype"], asked["scale"]
    short = (asked["max_positions"] or MAX_TOKENS) <= MAX_SHORT_TOKENS
    layers = []
    capacities = _per_layer("capacity", asked["capacity"], num_layers)
    policies = _per_layer("policy", asked["policy"], num_layers)
    ranks = _per_layer("rank", asked["rank"], num_layers)
    codes = _per_layer("quantization", asked["quantization"], num_layers)
    for index, (capacity, policy) in enumerate(zip(capacities, policies, strict=True)):
        heads = capacity if isinstance(capacity, tuple) else (capacity,) * kv_heads
        if len(heads) != kv_heads:
            raise ValueError(
                f"capacity: got {len(heads)} entries for layer {index}, expected one, or "
                f"{kv_heads}: one a KV head"
            )
        slots = tuple(_slots(value, asked["max_positions"]) for value in heads)
        _check_codes(codes[index], _checked_policy(policy))
        layers.append(
            LayerConfig(
                query_heads=asked["query_heads"],
                kv_heads=kv_heads,
                head_dim=asked["head_dim"],
                capacities=slots,
                policies=tuple(_checked_policy(policy).resolve(c) for c in slots),
                rank=ranks[index],
                scale=scale if scale is not None else asked["head_dim"] ** -0.5,
                softcap=asked["softcap"],
                dtype=dtype,
                state_dtype=asked["state_dtype"] or default_state_dtype(dtype),
                quantization=codes[index],
                position_dtype="int16" if codes[index] is not None and short else "int32",
            )
        )
    return layers


def _check_codes(quantization: Quantization | None, policy: Policy) -> None:
    """Refuse policies that look at keys themselves: in the basis of codes those are others."""
    if quantization is None:
        return
    norm = policy.starts is Start.KEY_NORM and quantization.transform != "hadamard"
    if norm or policy.starts is Start.GIVEN:
        raise ValueError(
            f"quantization: {quantization} cannot be had with {policy}, whose scores start from "
            "the key itself"
        )


def _checked_codes(codes: Any) -> Codes:
    if codes is not None and not isinstance(codes, Quantization):
        raise TypeError(f"quantization: got {codes!r}, expected a Quantization or None")
    return codes


def _read_codes(data: Any) -> Codes:
    return None if data is None else Quantization.from_dict(data)


def codes_data(quantization: Codes | Sequence[Codes]) -> Any:
    """A `CacheConfig.quantization` as JSON-ready data."""
    if isinstance(quantization, Sequence):
        return [codes_data(entry) for entry in quantization]
    return None if quantization is None else quantization.to_dict()


def _plain(value: Any) -> Any:
    """The value with sequences as tuples, and NumPy's numbers as Python's."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(_plain(entry) for entry in value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)):
        return float(value)
    return value


def _per_layer(name: str, value: Any, num_layers: int) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return (value,) * num_layers
    if len(value) != num_layers:
        raise ValueError(
            f"{name}: got {len(value)} entries, expected one, or {num_layers}: one a layer"
        )
    return tuple(value)


def collapsed(values: tuple[Any, ...]) -> Any:
    """One value where all are equal, else all of them."""
    return values[0] if all(value == values[0] for value in values) else values


def _slots(value: Any, max_positions: int | None) -> int:
    if isinstance(value, (numbers.Integral, bool)):
        return check_int("capacity", value, minimum=1)
    share = check_real("capacity", parse_share(value), above=0.0, maximum=1.0)
    if max_positions is None:
        raise ValueError(
            f"capacity: got the share {share}, which needs max_positions to count slots"
        )
    # A share such as 0.07 of 100 is 7 slots, whatever its last binary digit says.
    return math.ceil(round(share * max_positions, 6))


def parse_share(value: Any) -> Any:
    """``"5%"`` as 0.05; anything but such a text as it is."""
    if isinstance(value, str) and value.endswith("%"):
        try:
            return float(value[:-1]) / 100
        except ValueError:
            return value
    return value


def _checked_policy(policy: Any) -> Policy:
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: got {policy!r}, expected a Policy such as H2O() or SinkWindow()")
    return policy
