"""`CacheConfig`: the shapes of a cache, layer by layer, and what they cost in bytes."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._checks import check_choice, check_int, check_real
from .policies import Policy, policy_from_dict

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
POSITION_BYTES = 4
LENGTH_BYTES = 4
HISTORY_BYTES = 8

FORMAT_VERSION = 1


def dtype_name(dtype: Any) -> str:
    """A dtype's plain name, whatever library it comes from.

    Parameters
    ----------
    dtype
        A name, or a dtype of torch or NumPy.

    Raises
    ------
    ValueError
        If it is none of float64, float32, float16 and bfloat16.
    """
    name = getattr(dtype, "__name__", None) or str(dtype)
    return str(check_choice("dtype", name.removeprefix("torch."), DTYPE_BYTES))


@dataclass(frozen=True)
class LayerConfig:
    """What one layer's cache is: everything a backend needs to know besides the arrays."""

    query_heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    policy: Policy
    rank: int
    scale: float
    softcap: float | None
    dtype: str
    state_dtype: str

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def score_dtype(self) -> str:
        """Scores and sums are float32, or float64 where keys and values are."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of one head: key, value, score, position, history."""
        history = HISTORY_BYTES if self.policy.history_window else 0
        pair = 2 * self.head_dim * DTYPE_BYTES[self.dtype]
        return pair + DTYPE_BYTES[self.score_dtype] + POSITION_BYTES + history

    @property
    def low_rank_bytes(self) -> int:
        """Bytes of H and z of one head."""
        return self.rank * (self.head_dim + 1) * DTYPE_BYTES[self.state_dtype]

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes that one sequence takes in this layer."""
        return (
            self.kv_heads * (self.capacity * self.slot_bytes + self.low_rank_bytes) + LENGTH_BYTES
        )


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
        C, the pairs each head holds, the current token's included; or a share of `max_positions`
        in (0, 1], rounded up; or one of these for each layer.
    policy
        Which pair leaves when the cache is full; or one policy for each layer.
    rank
        R, the rows of the low-rank state; 0 runs the policy alone.
    hidden
        Hidden size of the feature maps; ``None`` takes whatever the maps have.
    max_positions
        The model's longest sequence; needed only where `capacity` is a share.
    scale
        Factor on q·k before the softmax. Default: 1 / sqrt(head_dim).
    softcap
        Where given, logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
    dtype
        Of keys and values: float64, float32, float16 or bfloat16, or a dtype of torch or NumPy.
    state_dtype
        Of H and z, likewise. Sums are formed in float32 and rounded when stored.
        Default: float32 (float64 where `dtype` is).

    Raises
    ------
    ValueError, TypeError
        If a number is out of range, or the capacity too small for the policy.
    """

    num_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    capacity: int | float | Sequence[int | float]
    policy: Policy | Sequence[Policy]
    rank: int = 8
    hidden: int | None = None
    max_positions: int | None = None
    scale: float | None = None
    softcap: float | None = None
    dtype: Any = "float32"
    state_dtype: Any = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "query_heads", "kv_heads", "head_dim"):
            check_int(name, getattr(self, name), minimum=1)
        check_int("rank", self.rank, minimum=0)
        for name in ("hidden", "max_positions"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), minimum=1)
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"query_heads: got {self.query_heads}, "
                f"expected a multiple of kv_heads = {self.kv_heads}"
            )
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name), above=0.0)
        dtype = dtype_name(self.dtype)
        default_state = "float64" if dtype == "float64" else "float32"
        state_dtype = default_state if self.state_dtype is None else dtype_name(self.state_dtype)
        capacities = tuple(
            _slots(value, self.max_positions)
            for value in _per_layer("capacity", self.capacity, self.num_layers)
        )
        policies = tuple(
            _resolved(policy, capacity)
            for policy, capacity in zip(
                _per_layer("policy", self.policy, self.num_layers), capacities, strict=True
            )
        )
        # Two spellings of the same cache are to compare equal and to hash alike.
        normal = {
            "capacity": _collapsed(capacities),
            "policy": _collapsed(policies),
            "dtype": dtype,
            "state_dtype": state_dtype,
            "scale": float(self.scale) if self.scale is not None else self.head_dim**-0.5,
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)

    @property
    def capacities(self) -> tuple[int, ...]:
        """C of each layer."""
        return _per_layer("capacity", self.capacity, self.num_layers)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The resolved policy of each layer."""
        return _per_layer("policy", self.policy, self.num_layers)

    @property
    def group(self) -> int:
        """G, the query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    def layer(self, index: int) -> LayerConfig:
        """What a backend needs to know of layer `index`.

        Raises
        ------
        ValueError
            If there is no such layer.
        """
        check_int("layer", index, minimum=0, maximum=self.num_layers - 1)
        scale = self.scale
        if scale is None:
            raise AssertionError("scale is filled in when the config is made")
        return LayerConfig(
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            capacity=self.capacities[index],
            policy=self.policies[index],
            rank=self.rank,
            scale=scale,
            softcap=self.softcap,
            dtype=self.dtype,
            state_dtype=self.state_dtype,
        )

    def bytes_per_sequence(self, dtype: Any = None) -> int:
        """Bytes that one sequence takes in all layers together, whatever its length.

        Parameters
        ----------
        dtype
            Of keys and values; default: the config's own.
        """
        config = self if dtype is None else self.with_dtype(dtype)
        return sum(config.layer(i).bytes_per_sequence for i in range(config.num_layers))

    def with_dtype(self, dtype: Any) -> CacheConfig:
        """The same cache for keys and values of another dtype."""
        name = dtype_name(dtype)
        if name == self.dtype:
            return self
        # A state as wide as the pairs follows them; one the user chose narrower stays.
        follows = self.state_dtype in ("float32", "float64")
        return self.replace(dtype=name, state_dtype=None if follows else self.state_dtype)

    def replace(self, **changes: Any) -> CacheConfig:
        """A copy with some parameters changed, checked anew."""
        return dataclasses.replace(self, **changes)

    def baseline_plus(self) -> CacheConfig:
        """The sparse cache to compare with: rank 0, the low-rank state's bytes spent on slots.

        The extra slots are rounded up, so that the comparison never favours the low-rank state.
        """
        extra = [
            math.ceil(layer.low_rank_bytes / layer.slot_bytes)
            for layer in map(self.layer, range(self.num_layers))
        ]
        capacities = [c + more for c, more in zip(self.capacities, extra, strict=True)]
        return self.replace(capacity=capacities, rank=0)

    @classmethod
    def for_budget(
        cls,
        *,
        bytes_per_sequence: int,
        policy: Policy | Sequence[Policy],
        **parameters: Any,
    ) -> CacheConfig:
        """The config with the largest capacity, equal in all layers, that keeps within a budget.

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
        layers = map(smallest.layer, range(smallest.num_layers))
        slot = sum(layer.kv_heads * layer.slot_bytes for layer in layers)
        return cls(capacity=least + spare // slot, policy=policy, **parameters)

    @classmethod
    def from_model(
        cls,
        model_config: Any,
        *,
        capacity: int | float | Sequence[int | float] | None = None,
        policy: Policy | Sequence[Policy],
        rank: int = 8,
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
        shapes = model_shapes(model_config)
        shapes.update(parameters)
        if capacity is None:
            capacity = shapes.get("max_positions")
            if capacity is None:
                raise ValueError(
                    "capacity: needed, since the model's configuration names no length"
                )
        return cls(capacity=capacity, policy=policy, rank=rank, **shapes)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready data; `from_dict` reads it back."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["capacity"] = list(self.capacities)
        data["policy"] = [policy.to_dict() for policy in self.policies]
        return {"format": FORMAT_VERSION, **data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CacheConfig:
        """Read a config back from `to_dict`'s data.

        Raises
        ------
        ValueError
            If the data is of another format, or has unknown or missing fields.
        """
        fields = dict(data)
        if fields.pop("format", None) != FORMAT_VERSION:
            raise ValueError(f"format: got {data.get('format')!r}, expected {FORMAT_VERSION}")
        known = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(set(fields) ^ known):
            raise ValueError(f"config: unknown or missing field(s) {wrong}")
        fields["policy"] = [policy_from_dict(policy) for policy in fields["policy"]]
        return cls(**fields)


def model_shapes(model_config: Any) -> dict[str, Any]:
    """The parameters of `CacheConfig` that a transformers configuration determines."""
    text = model_config
    if callable(getattr(model_config, "get_text_config", None)):
        text = model_config.get_text_config()
    query_heads = _attribute(text, "num_attention_heads", "n_head")
    kv_heads = query_heads
    if getattr(text, "model_type", "") == "falcon":
        if not text.new_decoder_architecture and text.multi_query:
            kv_heads = 1
        else:
            kv_heads = text.num_kv_heads or query_heads
    else:
        kv_heads = getattr(text, "num_key_value_heads", None) or query_heads
    head_dim = getattr(text, "head_dim", None)
    if head_dim is None:
        head_dim = _attribute(text, "hidden_size") // query_heads
    shapes: dict[str, Any] = {
        "num_layers": len(full_attention_layers(text)),
        "query_heads": query_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_positions": getattr(text, "max_position_embeddings", None),
        "softcap": getattr(text, "attn_logit_softcapping", None),
    }
    if getattr(text, "query_pre_attn_scalar", None) is not None:
        shapes["scale"] = text.query_pre_attn_scalar**-0.5
    elif getattr(text, "attention_multiplier", None) is not None:
        shapes["scale"] = text.attention_multiplier
    dtype = getattr(text, "dtype", None)
    if dtype is not None:
        shapes["dtype"] = dtype_name(dtype)
    return shapes


def full_attention_layers(model_config: Any) -> list[int]:
    """Indices of the model's layers that attend over everything: those that get a LESS cache.

    Raises
    ------
    ValueError
        If there is none, because every layer has a sliding window.
    """
    count = _attribute(model_config, "num_hidden_layers", "n_layer")
    types = getattr(model_config, "layer_types", None)
    if types is None:
        sliding = getattr(model_config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * count
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    if not full:
        raise ValueError(
            "model_config: every layer has a sliding window, so no layer's cache grows; "
            "set sliding_window=None in the model's configuration to let LESS hold the past instead"
        )
    return full


def _attribute(model_config: Any, *names: str) -> Any:
    for name in names:
        if getattr(model_config, name, None) is not None:
            return getattr(model_config, name)
    raise ValueError(
        f"model_config: {type(model_config).__name__} has no attribute {' or '.join(names)}"
    )


def _per_layer(name: str, value: Any, num_layers: int) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return (value,) * num_layers
    if len(value) != num_layers:
        raise ValueError(
            f"{name}: got {len(value)} entries, expected one, or {num_layers}: one a layer"
        )
    return tuple(value)


def _collapsed(values: tuple[Any, ...]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def _slots(value: Any, max_positions: int | None) -> int:
    if isinstance(value, (numbers.Integral, bool)):
        return check_int("capacity", value, minimum=1)
    share = check_real("capacity", value, above=0.0, maximum=1.0)
    if max_positions is None:
        raise ValueError(
            f"capacity: got the share {share}, which needs max_positions to count slots"
        )
    # A share such as 0.07 of 100 is 7 slots, whatever its last binary digit says.
    return math.ceil(round(share * max_positions, 6))


def _checked_policy(policy: Any) -> Policy:
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: got {policy!r}, expected a Policy such as H2O() or SinkWindow()")
    return policy


def _resolved(policy: Any, capacity: int) -> Policy:
    return _checked_policy(policy).resolve(capacity)
