"""A training run's folder: what it was started with, checkpoints, logs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import replaced, write_text


def digest_tokens(tokens: Tensor) -> str:
    """SHA-256 of token ids and their shape."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make `folder` this run's, or check that it is.

    Raises
    ------
    ValueError
        If the folder holds a run with other settings.
    """
    path = folder / "run.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(settings))
        if wrong := sorted(
            k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)
        ):
            told = ", ".join(f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in wrong)
            raise ValueError(f"out: {folder} holds a run with other settings ({told})")
        return
    write_text(path, json.dumps(settings, indent=2) + "\n")


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON-ready facts as one safetensors file, by way of a temporary name."""
    with replaced(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, str(temporary), metadata={"facts": json.dumps(dict(facts))})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read what `save_checkpoint` wrote; ``None`` where there is nothing.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged or no checkpoint: {error}") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An Adam optimiser's state by flat names."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
    whole = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


class Log:
    """A JSON-lines file; lines past a resumed step are dropped first.

    Parameters
    ----------
    path
        The file.
    upto
        Lines whose ``"step"`` is above this are of a future that was lost with the process.
    """

    def __init__(self, path: Path, upto: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= upto]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, **facts: Any) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
