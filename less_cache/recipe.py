"""A model's cache in one file: config, feature maps, bases of codes, and which model it is for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ._checks import check_path
from ._files import json_text, parse_json, write_text
from ._hub import Pretrained
from ._tensor_files import DIGEST, digest_of, read_tensors, write_tensors
from .config import CacheConfig
from .dtypes import DTYPE_BYTES
from .feature_maps import FeatureMaps
from .maps_io import WEIGHTS, public_name
from .policies import policy_from_dict
from .provenance import codes_text, ranks_text
from .quantization.transforms import Transforms, check_transforms

FILE = "less_cache.safetensors"
"""The one file that counts: a save is one step."""
CARD = "README.md"
"""What people and the hub read; the library does not."""
FORMAT = "less_cache.recipe.1"
PART = re.compile(r"(maps|transforms)\.(layers\.\d+\.\w+)")


class CacheRecipe(Pretrained):
    """All that makes a model's cache: what `less-cache tune` finds, and every runtime loads.

    Parameters
    ----------
    config
        Shapes, slots, policy, rank and bits.
    maps
        φ and ψ of the layers whose rank is above 0.
    transforms
        The bases of codes of the layers that have calibrated ones.
    model
        What tells the model from others, JSON-ready:
        ``integrations.introspection.description(model.config)`` makes it.
    record
        How it was made, JSON-ready.

    Raises
    ------
    ValueError, TypeError
        If the parts do not go together.
    """

    _FILES = (FILE,)
    _MESSAGE = "Upload a less_cache recipe"

    def __init__(
        self,
        config: CacheConfig,
        maps: FeatureMaps | None = None,
        transforms: Transforms | None = None,
        *,
        model: Mapping[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        check_parts(config, maps, transforms)
        for name, given in (("model", model), ("record", record)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"{name}: got {type(given).__name__}, expected a dict")
        self.config = config
        self.maps = maps
        self.transforms = transforms
        self.model = dict(model or {})
        self.record = dict(record or {})

    def __repr__(self) -> str:
        return f"CacheRecipe({self.config}, {self.maps}, model={self.model.get('name')!r})"

    @property
    def digest(self) -> str:
        """SHA-256 of everything in it."""
        return digest_of(*self._parts())

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes that one sequence takes, whatever its length; of uncoded pairs in 16 bits.

        Nobody has to serve in more: it is what budgets are counted in.
        """
        wide = DTYPE_BYTES[self.config.dtype] > 2
        return self.config.bytes_per_sequence("float16" if wide else None)

    @property
    def share(self) -> float | None:
        """Those bytes as a share of the full cache's in 16 bits at the model's longest context.

        ``None`` where the model does not say how long that is.
        """
        longest = self.config.max_positions
        if longest is None:
            return None
        return self.bytes_per_sequence / self.config.full_cache_bytes(longest, "float16")

    def check_model(self, description: Mapping[str, Any]) -> None:
        """Refuse another model than the one that this is for.

        Parameters
        ----------
        description
            As of `model`. Its name may differ: folders are renamed.

        Raises
        ------
        ValueError
            That says what differs.
        """
        wrong = [
            f"{name} = {wanted!r}, but this model has {description.get(name)!r}"
            for name, wanted in self.model.items()
            if name != "name" and description.get(name) != wanted
        ]
        if wrong:
            raise ValueError(f"recipe: made for a model of {'; '.join(wrong)}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it into a folder, with a card for people.

        Whoever reads meanwhile, or after a crash, finds the old one or the new one.

        Raises
        ------
        ValueError
            If a policy is a user's own that nobody registered.
        """
        path = check_path("folder", folder)
        tensors, header = self._parts()
        write_tensors(path / FILE, tensors, header)
        write_text(path / CARD, self.card())

    @classmethod
    def _read(cls, folder: Path) -> CacheRecipe:
        path = folder / FILE
        if not path.is_file():
            if (folder / WEIGHTS).is_file():
                raise FileNotFoundError(
                    f"{folder}: holds feature maps only, no {FILE}; use --maps, or "
                    "FeatureMaps.from_pretrained"
                )
            raise FileNotFoundError(f"{folder}: holds no {FILE}, which every recipe has")
        header, tensors = read_tensors(path)
        if header.get("format") != FORMAT or DIGEST not in header:
            raise ValueError(f"{path}: format {header.get('format')!r}, expected {FORMAT!r}")
        parts: dict[str, dict[str, Tensor]] = {"maps": {}, "transforms": {}}
        for key, tensor in tensors.items():
            match = PART.fullmatch(key)
            if match is None:
                raise ValueError(f"{path}: unexpected tensor {key!r}")
            parts[match[1]][match[2]] = tensor
        where = str(path)
        try:
            config, model, record = (
                _read_dict(where, name, header[name]) for name in ("config", "model", "record")
            )
            maps = transforms = None
            if "maps" in header:
                maps = FeatureMaps.from_parts(f"{where}: maps", parts["maps"], header["maps"])
            if "transforms" in header:
                fields = _read_dict(where, "transforms", header["transforms"])
                transforms = Transforms.from_parts(
                    f"{where}: transforms", parts["transforms"], fields
                )
            return cls(CacheConfig.from_dict(config), maps, transforms, model=model, record=record)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: damaged: {error}") from None

    def card(self) -> str:
        """A model card: YAML for the hub, and what a person wants to know."""
        name = public_name(self.model.get("name"))
        fields = {"library_name": "less_cache", "tags": ["kv-cache", "less"]}
        if name is not None:
            fields["base_model"] = name
        if "license" in self.record:
            fields["license"] = self.record["license"]
        front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in fields.items())
        config = self.config
        slots = sorted(slots for layer in config.capacities for slots in layer)
        lines = [
            f"A small cache for {name or 'a decoder'}: {self.bytes_per_sequence:,} bytes a "
            f"sequence, whatever its length{self._share_text()}.",
            "",
            "```python",
            "import less_cache as lc",
            "",
            'with lc.attach(model, "this folder or repository"):',
            "    model.generate(**inputs)",
            "```",
            "",
            f"- policy: {policies_text(config)}",
            f"- slots a head: {slots[0]} to {slots[-1]}",
            f"- rank of the low-rank state: {ranks_text(config.rank)}",
            f"- pairs of {config.dtype}, stored {codes_text(config.quantization)}",
        ]
        return f"---\n{front}\n---\n\n" + "\n".join(lines) + "\n"

    def _share_text(self) -> str:
        if self.share is None:
            return ""
        longest = self.config.max_positions
        return f": {self.share:.2%} of the full cache's in 16 bits at {longest:,} tokens"

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The file's tensors and header."""
        model = {**self.model}
        if "name" in model:
            model["name"] = public_name(model["name"])
        header = {
            "format": FORMAT,
            "config": json_text(self.config.to_dict()),
            "model": json_text(model),
            "record": json_text(self.record),
        }
        tensors: dict[str, Tensor] = {}
        if self.maps is not None:
            own, header["maps"] = self.maps.to_parts()
            tensors |= {f"maps.{key}": tensor for key, tensor in own.items()}
        if self.transforms is not None:
            own, fields = self.transforms.to_parts()
            header["transforms"] = json_text(fields)
            tensors |= {f"transforms.{key}": tensor for key, tensor in own.items()}
        return tensors, header


def policies_text(config: CacheConfig) -> str:
    """The policies that a config was made with, in words, each once.

    Of a ``recent`` that follows the capacity there would be one a head.
    """
    asked = map(policy_from_dict, config.to_dict()["policy"])
    return ", ".join(dict.fromkeys(map(str, asked)))


def check_parts(
    config: CacheConfig, maps: FeatureMaps | None, transforms: Transforms | None
) -> None:
    """Refuse a config, maps and transforms that do not go together.

    Raises
    ------
    ValueError, TypeError
        That says what is wrong.
    """
    if not isinstance(config, CacheConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a CacheConfig")
    if maps is not None and not isinstance(maps, FeatureMaps):
        raise TypeError(f"maps: got {type(maps).__name__}, expected FeatureMaps")
    if config.has_state and maps is None:
        raise ValueError(f"maps: got None, but rank = {config.rank} needs feature maps")
    if maps is not None and not config.has_state:
        raise ValueError("maps: given, but rank = 0 has no low-rank state that would use them")
    if maps is not None:
        maps.check_against(config)
    check_transforms(config, transforms)


def _read_dict(where: str, name: str, text: str) -> dict[str, Any]:
    found = parse_json(f"{where}: {name}", text)
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {name}: unexpected {found!r:.80}, expected a dict")
    return found
