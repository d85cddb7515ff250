"""``--cache``: a whole cache from one folder, in place of the options that put one together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .._checks import check_memory
from ..config import CacheConfig
from ..feature_maps import FeatureMaps
from ..recipe import CacheRecipe
from .options import SHIPPED
from .quantized import Codes

CacheOption = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of a whole cache (slots, policy, bits, maps, bases), in place of "
        f"the options that choose them; {SHIPPED}:5%: one that ships, for the shipped model."
    ),
]

IN_IT = (
    *("capacity", "policy", "rank", "share", "maps"),
    *("bits", "key_bits", "value_bits", "transform", "transforms"),
    *("query_heads", "kv_heads", "head_dim"),
)
"""What a whole cache says, so that no option has to."""

LESS = "LESS"
"""What tables call a cache with a low-rank state."""


@dataclass(frozen=True)
class GivenCache:
    """A whole cache that a command was given.

    Parameters
    ----------
    name
        As the user wrote it.
    recipe
        What is there.
    """

    name: str
    recipe: CacheRecipe

    @property
    def title(self) -> str:
        """Its name without the way to it."""
        return Path(self.name).resolve().name if Path(self.name).is_dir() else self.name

    @property
    def maps(self) -> dict[str, FeatureMaps]:
        """Its maps by the name that tables use: none where its rank is 0."""
        return {} if self.recipe.maps is None else {LESS: self.recipe.maps}

    @property
    def codes(self) -> Codes:
        """How its slots hold pairs."""
        return Codes(self.recipe.config.quantization, self.recipe.transforms)

    def config_for(self, model: Any) -> CacheConfig:
        """Its config, in the model's dtype.

        Raises
        ------
        ValueError
            If it was made for another model, or one sequence's cache is larger than the model's
            device.
        """
        from ..integrations.introspection import description

        try:
            self.recipe.check_model(description(model.config))
        except ValueError as error:
            reason = str(error).removeprefix("recipe: ")
            raise ValueError(f"cache: {self.name}: {reason}") from None
        config = self.recipe.config.with_dtype(model.dtype)
        check_memory("cache", self.name, config.bytes_per_sequence(), model.device)
        return config


def read_cache(context: typer.Context, name: str | None) -> GivenCache | None:
    """The cache of that name; ``None`` where none is given.

    Raises
    ------
    ValueError
        If an option that it replaces is given as well, or the file is damaged.
    FileNotFoundError
        If there is no such folder or repository, or it holds something else.
    """
    if name is None:
        return None
    for option in IN_IT:
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            word = option.replace("_", "-")
            raise ValueError(
                f"{option}: given beside --cache, which has its own; leave out --{word}"
            )
    return GivenCache(name, load_cache(name))


def load_cache(name: str) -> CacheRecipe:
    """The whole cache in a folder, of the hub, or that ships with the shipped model.

    Raises
    ------
    FileNotFoundError, ValueError
        As `CacheRecipe.from_pretrained`.
    """
    from ..reference_model import cache_folder

    where = cache_folder(name)
    try:
        return CacheRecipe.from_pretrained(where)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"cache: {error}") from None
