"""A training run's folder: what it was started with, checkpoints, logs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import json_text, parse_json, write_text
from .._tensor_files import read_tensors, write_tensors
from ..quantization.transforms import Transforms

SAMPLED = 1024
"""Numbers of a parameter that tell models apart."""


def digest_tokens(tokens: Tensor) -> str:
    """SHA-256 of token ids and their shape."""
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(tokens.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_digest(model: Any) -> str:
    """SHA-256 of a model's parameters: names, shapes, and some numbers of each.

    Enough to tell models apart, and quick where hashing all of a large one would not be.
    """
    digest = hashlib.sha256(str(model.config.model_type).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        numbers = flat[:: max(1, flat.numel() // SAMPLED)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()


def transforms_record(transforms: Transforms | None) -> dict[str, str]:
    """What a run notes of the bases of its codes: nothing where there are none."""
    return {} if transforms is None else {"transforms_sha256": transforms.digest}


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make `folder` this run's, or check that it is.

    Raises
    ------
    ValueError
        If the folder holds a run with other settings.
    """
    path = folder / "run.json"
    if path.exists():
        found = read_settings(path)
        wanted = json.loads(json_text(settings))
        if told := differences(found, wanted):
            raise ValueError(f"out: {folder} holds a run with other settings: {told}")
        return
    write_text(path, json_text(settings, indent=2) + "\n")


def read_settings(path: Path) -> dict[str, Any]:
    """What `claim` wrote.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    settings = parse_json(str(path), path.read_bytes())
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: damaged, holds no settings")
    return settings


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In words what differs between two runs' settings; "" where nothing does."""
    there, now = _flat(found), _flat(wanted)
    told = []
    for name in sorted(there.keys() | now.keys()):
        if there.get(name) != now.get(name):
            values = f": {there.get(name)!r} there, {now.get(name)!r} now"
            told.append(name + (values if len(values) < 80 else " differs"))
    return ", ".join(told)


def _flat(data: Any, name: str = "") -> dict[str, Any]:
    # What all layers agree on is told once.
    if isinstance(data, list) and data and all(entry == data[0] for entry in data):
        data = data[0]
    if not isinstance(data, Mapping):
        return {name: data}
    parts = (_flat(value, f"{name}.{key}" if name else key) for key, value in data.items())
    return {key: value for part in parts for key, value in part.items()}


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON-ready facts as one safetensors file, by way of a temporary name."""
    write_tensors(path, tensors, {"facts": json_text(facts)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read what `save_checkpoint` wrote; ``None`` where there is nothing.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    if not path.exists():
        return None
    header, tensors = read_tensors(path)
    if "facts" not in header:
        raise ValueError(f"{path}: damaged or no checkpoint: its header has no facts")
    return tensors, parse_json(f"{path}: facts", header["facts"])


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


def save_fit(
    path: Path,
    parameters: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
) -> None:
    """Write a fit between two steps: parameters, the best so far, the optimiser, and facts."""
    tensors = optimizer_tensors(optimizer)
    for kind, held in (("now", parameters), ("best", best)):
        tensors |= {f"{kind}.{name}": t for name, t in held.items()}
    save_checkpoint(path, tensors, facts)


def restore_fit(
    path: Path,
    parameters: Mapping[str, Tensor],
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any] | None:
    """Put back what `save_fit` wrote; its facts, or ``None`` where there is nothing."""
    found = load_checkpoint(path)
    if found is None:
        return None
    tensors, facts = found
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"now.{name}"])
            best[name] = tensors[f"best.{name}"].to(parameter.device)
    load_optimizer(optimizer, tensors)
    return facts


def best_of(value: float | None) -> float:
    """The least error so far, as a file holds it: infinity is no JSON."""
    return float("inf") if value is None else value


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
            file.write(json_text(facts) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """One entry a step: two processes that share a folder write the same lines twice."""
        lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return [*{entry["step"]: entry for entry in lines}.values()]
