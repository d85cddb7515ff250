"""Feature maps on disk and on the hub, and the official code's checkpoints."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ._files import replaced, write_text
from .feature_maps import FeatureMaps

WEIGHTS = "less_maps.safetensors"
CARD = "less_maps.json"
FORMAT_VERSION = 1
CARD_FIELDS = ("kind", "num_layers", "model_id", "training")


def save_folder(maps: FeatureMaps, folder: Path) -> None:
    """Write `WEIGHTS` and `CARD` into `folder`, each by way of a temporary name."""
    tensors = {
        # A copy: layers may share a tensor, which safetensors does not take.
        f"layers.{i}.{name}": tensor.detach().cpu().contiguous().clone()
        for i, layer in enumerate(maps)
        for name, tensor in layer.tensors.items()
    }
    card = {
        "format": FORMAT_VERSION,
        "kind": maps.kind,
        "num_layers": len(maps),
        **maps[0].shapes,
        "model_id": maps.model_id,
        "training": maps.record,
    }
    text = json.dumps(card, indent=2, sort_keys=False) + "\n"
    with replaced(folder / WEIGHTS) as temporary:
        save_file(tensors, str(temporary), metadata={"format": "pt"})
    write_text(folder / CARD, text)


def load_folder(folder: Path) -> FeatureMaps:
    """Read what `save_folder` wrote.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is damaged, or the two disagree.
    """
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: holds no {name}, which every folder of maps has")
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CARD}: not valid JSON: {error}") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT_VERSION:
        found = card.get("format") if isinstance(card, dict) else card
        raise ValueError(f"{folder / CARD}: format {found!r}, expected {FORMAT_VERSION}")
    try:
        tensors = load_file(str(folder / WEIGHTS))
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: damaged or truncated: {error}") from None
    if missing := [name for name in CARD_FIELDS if name not in card]:
        raise ValueError(f"{folder / CARD}: lacks {missing}")
    if card["num_layers"] not in range(1, len(tensors) + 1):
        raise ValueError(
            f"{folder}: {CARD} says num_layers = {card['num_layers']!r}, "
            f"{WEIGHTS} has {len(tensors)} tensors in all"
        )
    layers: list[dict[str, Any]] = [{} for _ in range(card["num_layers"])]
    for key, tensor in tensors.items():
        match = re.fullmatch(r"layers\.(\d+)\.(\w+)", key)
        if match is None or int(match[1]) >= len(layers):
            raise ValueError(f"{folder / WEIGHTS}: unexpected tensor {key!r}")
        layers[int(match[1])][match[2]] = tensor
    maps = FeatureMaps.from_tensors(
        layers, kind=card["kind"], model_id=card["model_id"], record=card["training"]
    )
    for name, size in maps[0].shapes.items():
        if card.get(name) != size:
            raise ValueError(
                f"{folder}: {CARD} says {name} = {card.get(name)}, {WEIGHTS} has {size}"
            )
    return maps


def locate(name: str | Path, subfolder: str, revision: str | None) -> Path:
    """The folder that `name` means, fetched from the hub where it is no local one."""
    local = Path(name)
    if local.is_dir():
        return local / subfolder
    looks_like_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None
    if not looks_like_id:
        raise FileNotFoundError(f"{name}: no such folder, and not a hub id of the form owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{name}: no such folder; to fetch it from the hub, install less_cache[transformers]"
        ) from None
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + CARD, prefix + WEIGHTS]
    fetched = snapshot_download(str(name), revision=revision, allow_patterns=patterns)
    return Path(fetched) / subfolder


def upload(maps: FeatureMaps, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload the maps as one commit and return its address."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ImportError(
            "push_to_hub needs huggingface_hub: install less_cache[transformers]"
        ) from None
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_folder(maps, Path(folder))
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload LESS feature maps"
        )
    return str(commit.commit_url)


def load_official(folder: Path) -> FeatureMaps:
    """Read the official code's ``layer_{i}.pth`` files; see `FeatureMaps.from_official`."""
    numbers = sorted(
        int(match[1])
        for path in folder.glob("layer_*.pth")
        if (match := re.fullmatch(r"layer_(\d+)\.pth", path.name))
    )
    if not numbers or numbers != list(range(len(numbers))):
        raise FileNotFoundError(
            f"{folder}: has layer files {numbers}, "
            "expected layer_0.pth, layer_1.pth, ... without a gap"
        )
    layers = [_official_layer(folder / f"layer_{i}.pth") for i in numbers]
    return FeatureMaps.from_tensors(
        layers, kind="paper", record={"source": "official LESS checkpoint"}
    )


def _official_layer(path: Path) -> dict[str, torch.Tensor]:
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file may end in any error of the unpickler's.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: damaged, or holds more than tensors: {reason}") from None
    state = checkpoint.get("model_state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds no 'model_state_dict', so it is no LESS checkpoint")
    # Falcon's single ψ is a Linear, which stores its matrix transposed and without a head axis.
    multi_query = "kernel_k_mat1.weight" in state
    try:
        if multi_query:
            psi = [
                state[f"{name}.weight"].T.unsqueeze(0)
                for name in ("kernel_k_mat1", "kernel_k_mat2", "interaction_k")
            ]
        else:
            psi = [state[name] for name in ("kernel_k_mat1", "kernel_k_mat2", "interaction_k")]
        scales = [state[name][0, :, 0] for name in ("scalingD", "scalingD2")]
        names = ("phi_w1", "phi_w2", "psi_w1", "psi_w2", "psi_w3", "psi_s1", "psi_s2")
        values = (state["kernel_q_mat1"], state["kernel_q_mat2"], *psi, *scales)
        return {name: value.contiguous() for name, value in zip(names, values, strict=True)}
    except KeyError as missing:
        raise ValueError(f"{path}: lacks {missing}, which every LESS checkpoint has") from None
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: a parameter is no tensor of its shape: {error}") from None


def _numpy_globals() -> list[Any]:
    """What the loss curves in those files are made of: NumPy arrays of numbers, no code."""
    import numpy as np
    from numpy._core.multiarray import _reconstruct, scalar

    old_names = [
        (_reconstruct, "numpy.core.multiarray._reconstruct"),
        (scalar, "numpy.core.multiarray.scalar"),
    ]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    return [_reconstruct, scalar, *old_names, np.ndarray, np.dtype, *dtypes]
