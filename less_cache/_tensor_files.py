"""Safetensors files with a header of ours and a digest of everything in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._files import replaced

DIGEST = "sha256"
"""The header's entry that covers all other entries and all tensors."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Write one file, by way of a temporary name, and return its digest."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = digest_of(whole, header)
    with replaced(path) as temporary:
        save_file(whole, str(temporary), metadata={**header, DIGEST: digest})
    return digest


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors of a file.

    Raises
    ------
    ValueError
        If it is no whole safetensors file, or has a digest that does not fit.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file: {error}") from None
    stored = header.get(DIGEST)
    others = {name: text for name, text in header.items() if name != DIGEST}
    if stored is not None and stored != digest_of(tensors, others):
        raise ValueError(f"{path}: damaged: what it holds does not have the digest it names")
    return header, tensors


def digest_of(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of a header and of every name, dtype, shape and byte of the tensors."""
    shapes = {name: [str(t.dtype), *t.shape] for name, t in tensors.items()}
    digest = hashlib.sha256(json.dumps([dict(header), shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
