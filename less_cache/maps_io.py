"""Feature maps on disk and on the hub, and the official code's checkpoints: tensors and a card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ._files import json_text, parse_json
from ._tensor_files import DIGEST, read_tensors, write_tensors

WEIGHTS = "less_maps.safetensors"
"""Tensors, and since format 2 the card in their header: one file, so that a save is one step."""
CARD = "less_maps.json"
"""Where format 1 had its card."""
FORMAT_VERSION = 2
CARD_FIELDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "num_layers": (int,),
    "model_id": (str, NoneType),
    "training": (dict,),
}


def save_folder(
    folder: Path, layers: Sequence[Mapping[str, Tensor]], card: Mapping[str, Any]
) -> None:
    """Write maps into `folder`, in place of those that it holds.

    Parameters
    ----------
    folder
        Made if need be.
    layers
        Each layer's tensors by name.
    card
        `CARD_FIELDS` and the sizes, JSON-ready.
    """
    header = {"format": "pt", "card": card_text(card)}
    write_tensors(folder / WEIGHTS, named_tensors(layers), header)
    # Where one is left, it is that of older maps; `WEIGHTS` with a card of its own goes first.
    (folder / CARD).unlink(missing_ok=True)


def load_folder(folder: Path) -> tuple[list[dict[str, Tensor] | None], dict[str, Any]]:
    """Read what `save_folder` wrote: each layer's tensors by name, and the card.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is damaged, or tensors and card disagree.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no {WEIGHTS}, which every folder of maps has")
    header, tensors = read_tensors(path)
    if "card" in header:
        card = read_card(str(path), header["card"])
        if DIGEST not in header:
            raise ValueError(f"{path}: its header lacks the digest of the maps")
    else:
        path = folder / CARD
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: holds no {CARD}, and {WEIGHTS} has no card either")
        card = read_card(str(path), path.read_bytes(), 1)
    return by_layer(str(path), tensors, card), card


def named_tensors(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all layers by one name each, as files have them."""
    return {
        # A copy: layers may share a tensor, which safetensors does not take.
        f"layers.{i}.{name}": tensor.detach().cpu().contiguous().clone()
        for i, layer in enumerate(layers)
        for name, tensor in layer.items()
    }


def by_layer(
    where: str, tensors: Mapping[str, Tensor], card: Mapping[str, Any]
) -> list[dict[str, Tensor] | None]:
    """Each layer's tensors by name, from `named_tensors`; ``None`` where the card's rank is 0.

    Raises
    ------
    ValueError
        If there are tensors of other layers than the card's, or too few of them.
    """
    count, ranks = card["num_layers"], card.get("rank")
    # Ranks by layer are as many as the card is long; a number alone may be any.
    most = len(ranks) if isinstance(ranks, list) else len(tensors)
    if count not in range(1, most + 1):
        raise ValueError(
            f"{where}: num_layers = {count!r}, but there are {len(tensors)} tensors in all"
        )
    layers: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for key, tensor in tensors.items():
        match = re.fullmatch(r"layers\.(\d+)\.(\w+)", key)
        if match is None or int(match[1]) >= len(layers):
            raise ValueError(f"{where}: unexpected tensor {key!r}")
        layers[int(match[1])][match[2]] = tensor
    if not isinstance(ranks, list):
        return [*layers]
    return [own if own or rank else None for own, rank in zip(layers, ranks, strict=False)]


def public_name(model_id: str | None) -> str | None:
    """A model's name as it may be published: of an absolute path its last part alone."""
    if model_id is None:
        return None
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(model_id).is_absolute():
            return kind(model_id).name
    return model_id


def card_text(card: Mapping[str, Any]) -> str:
    """A card as files have it."""
    return json_text({"format": FORMAT_VERSION, **card})


def read_card(where: str, text: str | bytes, version: int = FORMAT_VERSION) -> dict[str, Any]:
    """The card that `card_text` made.

    Raises
    ------
    ValueError
        If it is of another format, or lacks a field.
    """
    card = parse_json(f"{where}: card", text)
    if not isinstance(card, dict) or card.get("format") != version:
        found = card.get("format") if isinstance(card, dict) else card
        raise ValueError(f"{where}: format {found!r}, expected {version}")
    if missing := [name for name in CARD_FIELDS if name not in card]:
        raise ValueError(f"{where}: its card lacks {missing}")
    for name, kinds in CARD_FIELDS.items():
        if type(card[name]) not in kinds:
            raise ValueError(f"{where}: its card has {name} = {card[name]!r:.60}")
    return card


def load_official(folder: Path) -> list[dict[str, Tensor]]:
    """Each layer's tensors from the official code's files; see `FeatureMaps.from_official`."""
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
    return [_official_layer(folder / f"layer_{i}.pth") for i in numbers]


def _official_layer(path: Path) -> dict[str, Tensor]:
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
