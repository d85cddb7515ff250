"""What the plugin's options may be, and the cache that they describe."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._checks import check_int
from ..._files import parse_json
from ...backends import BACKENDS
from ...config import CacheConfig
from ...feature_maps import FeatureMaps
from ...policies import DEFAULT_POLICY, parse_policy, policy_from_dict
from ...provenance import mismatches
from ...quantization import Quantization
from ...quantization.transforms import Transforms
from ...recipe import CacheRecipe, check_parts
from ..introspection import description, model_shapes

logger = logging.getLogger(__name__)

NAME = "less_cache"
"""The key in vLLM's additional configuration."""

BACKEND = "less_cache.integrations.vllm.backend.LessBackend"
"""What vLLM finds as attention backend CUSTOM."""

PROMPT_CHUNK = 1024
"""Tokens of a prompt taken in at once, by default; vLLM's own defaults have room for it."""

BY_HAND = ("capacity", "policy", "rank", "maps", "bits", "key_bits", "value_bits", "transforms")
OPTIONS = ("cache", *BY_HAND, "prompt_chunk", "backend")


@dataclass(frozen=True)
class Parts:
    """A model's cache.

    Parameters
    ----------
    config
        For the full-attention layers, in the model's dtype.
    maps, transforms
        Where the config needs them.
    """

    config: CacheConfig
    maps: FeatureMaps | None
    transforms: Transforms | None


@dataclass(frozen=True)
class Settings:
    """The options, each of a kind that may be; what they name has not been looked at.

    Parameters
    ----------
    given
        What was given, as JSON.
    prompt_chunk
        Prompts are taken in in pieces that end at multiples of it.
    backend
        As of `plan_step`.
    """

    given: str
    prompt_chunk: int = PROMPT_CHUNK
    backend: str = "auto"

    @classmethod
    def from_dict(cls, data: Any) -> Settings:
        """Read the options.

        Raises
        ------
        ValueError, TypeError
            If one is unknown, of the wrong kind, or contradicts another.
        """
        if not isinstance(data, Mapping):
            raise TypeError(
                f"{NAME}: got {type(data).__name__}, expected an object with some of "
                f"{', '.join(OPTIONS)}"
            )
        if unknown := sorted(set(data) - set(OPTIONS)):
            raise ValueError(
                f"{NAME}: unknown option(s) {', '.join(unknown)}, expected some of "
                f"{', '.join(OPTIONS)}"
            )
        for name in ("cache", "policy", "maps", "transforms", "backend"):
            if not isinstance(data.get(name, ""), str):
                raise TypeError(f"{NAME}: {name}: got {data[name]!r}, expected a text")
        by_hand = sorted(set(data) & set(BY_HAND))
        if "cache" in data and by_hand:
            raise ValueError(
                f"{NAME}: {by_hand[0]}: given with cache, whose folder says all of that itself"
            )
        if "cache" not in data and "capacity" not in data:
            raise ValueError(
                f"{NAME}: capacity: missing; expected slots a head, or a share; or cache, a folder"
            )
        backend = data.get("backend", "auto")
        if backend not in ("auto", *BACKENDS):
            raise ValueError(
                f"{NAME}: backend: got {backend!r}, expected auto or one of {', '.join(BACKENDS)}"
            )
        chunk = check_int(
            f"{NAME}: prompt_chunk", data.get("prompt_chunk", PROMPT_CHUNK), minimum=1
        )
        return cls(json.dumps(dict(data), sort_keys=True), chunk, backend)

    def parts(self, model_config: Any, dtype: str) -> Parts:
        """The cache for a model, read from where the options say.

        Parameters
        ----------
        model_config
            The transformers configuration.
        dtype
            Of the model.

        Raises
        ------
        ValueError, TypeError, FileNotFoundError
            If it cannot be read, or is not for this model.
        """
        told = json.dumps({**description(model_config), "dtype": dtype}, sort_keys=True)
        shapes = json.dumps({**model_shapes(model_config), "dtype": dtype}, sort_keys=True)
        try:
            if "cache" in json.loads(self.given):
                return _from_folder(self.given, told)
            return _by_hand(self.given, shapes)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{NAME}: {error}") from None
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{NAME}: {error}") from error


@functools.lru_cache(maxsize=4)
def _from_folder(given: str, model: str) -> Parts:
    """What `less-cache tune` made, once a process."""
    wanted = json.loads(model)
    dtype = wanted.pop("dtype")
    recipe = CacheRecipe.from_pretrained(json.loads(given)["cache"])
    recipe.check_model(wanted)
    return Parts(recipe.config.with_dtype(dtype), recipe.maps, recipe.transforms)


@functools.lru_cache(maxsize=4)
def _by_hand(given: str, model_shapes: str) -> Parts:
    """Read it once a process, not once a layer."""
    data, shapes = json.loads(given), json.loads(model_shapes)
    maps = None
    if "maps" in data:
        maps = FeatureMaps.from_pretrained(data["maps"])
    rank = data.get("rank", 0 if maps is None else maps.rank)
    transforms = Transforms.load(Path(data["transforms"])) if "transforms" in data else None
    config = CacheConfig(
        capacity=data["capacity"],
        policy=_policy(data.get("policy", DEFAULT_POLICY)),
        rank=rank,
        quantization=_quantization(data, transforms),
        **shapes,
    )
    if config.has_state and maps is None:
        raise ValueError(f"maps: missing, but rank = {config.rank} needs a folder of feature maps")
    check_parts(config, maps, transforms)
    if maps is not None:
        for told in mismatches(maps, config, transforms=transforms):
            logger.warning("less_cache: maps: %s", told)
    return Parts(config, maps, transforms)


def _policy(text: str) -> Any:
    """A policy from its command-line spelling, or from the JSON of its fields."""
    if text.startswith("{"):
        return policy_from_dict(parse_json("policy", text))
    return parse_policy(text)


def _quantization(data: dict[str, Any], transforms: Transforms | None) -> Quantization | None:
    key_bits = data.get("key_bits", data.get("bits"))
    value_bits = data.get("value_bits", data.get("bits"))
    if transforms is not None:
        if not isinstance(transforms.key_bits, int) or not isinstance(transforms.value_bits, int):
            raise ValueError("transforms: fitted for other bits by layer: give cache, a folder")
        key_bits = key_bits or transforms.key_bits
        value_bits = value_bits or transforms.value_bits
    if key_bits is None and value_bits is None:
        return None
    if not key_bits or not value_bits:
        raise ValueError("bits: expected bits, or both key_bits and value_bits")
    return Quantization(key_bits, value_bits, "hadamard" if transforms is None else transforms.kind)
