"""What is asked of every cache, and the files that two environments exchange it in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARES = ("5", "2.5", "1.25")
"""Of the full cache's bytes in 16 bits, in percent."""


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Parameters
    ----------
    model
        The folder of a transformers model.
    windows
        Token ids, all equally many.
    prompt
        Tokens of a window that go in as its prompt.
    new_tokens
        Of the greedy continuation.
    batch
        Windows at a time.
    budgets
        For each share of the full cache's bytes, such as `SHARES`, how many they are.
    """

    model: str
    windows: tuple[tuple[int, ...], ...]
    prompt: int
    new_tokens: int
    batch: int
    budgets: dict[str, int]

    @property
    def digest(self) -> str:
        """What tells it from another one."""
        asked = (self.windows, self.prompt, self.new_tokens, self.batch)
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]

    def save(self, path: Path) -> None:
        """Write it to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read it from a file."""
        found = json.loads(path.read_text(encoding="utf-8"))
        found["windows"] = tuple(map(tuple, found["windows"]))
        return cls(**found)


class Results:
    """Results in a folder, a file each: a stopped run goes on where it was.

    Parameters
    ----------
    folder
        Made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, told: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of what is told of a cache: the one that is there, or a new one.

        Parameters
        ----------
        told
            JSON-ready; ``name`` and ``share`` among it, and all that its result depends on.
        measure
            Makes the result, JSON-ready.
        """
        path = self.folder / f"{digest_of(told)}.json"
        if not path.exists():
            found = {**told, **measure()}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(found), encoding="utf-8")
            part.replace(path)
        return json.loads(path.read_text(encoding="utf-8"))

    def of(self, entrants: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The results that are there of those that are told, in their order."""
        paths = [self.folder / f"{digest_of(told)}.json" for told in entrants]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def digest_of(told: Any) -> str:
    """What tells one cache from another."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]


def pairs_of(budget: int, heads: int, pair_bytes: float) -> int:
    """The most pairs a head that so many bytes hold, all heads alike."""
    return int(budget / heads / pair_bytes)
