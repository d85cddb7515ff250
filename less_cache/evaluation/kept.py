"""Results of a long evaluation, kept part by part: the same command goes on after a stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .._files import json_text, parse_json, write_text
from ..training.runs import claim


class KeptResults:
    """What was measured so far in a folder.

    Parameters
    ----------
    folder
        Made if need be.
    settings
        JSON-ready; all that the results depend on.

    Raises
    ------
    ValueError
        If the folder holds another run, or a file there is damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        claim(folder, settings)
        self.path = folder / "parts.json"
        self.parts: dict[str, Any] = {}
        if self.path.exists():
            found = parse_json(str(self.path), self.path.read_bytes())
            if not isinstance(found, dict):
                raise ValueError(f"{self.path}: damaged, holds no results")
            self.parts = found

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of that name: the one that is there, or a new one, which is then kept.

        Parameters
        ----------
        name
            Of the part.
        measure
            Makes the result, JSON-ready.
        """
        if name not in self.parts:
            self.parts[name] = measure()
            write_text(self.path, json_text(self.parts, indent=1) + "\n")
        return self.parts[name]
