"""Checks that ONNX Runtime can run an exported model, and that a session is the model's."""

from __future__ import annotations

from typing import Any

from exporters.common.manifest import MANIFEST, MODEL, Manifest

_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "uint8": "tensor(uint8)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}


def check_session(manifest: Manifest, inputs: list[Any], outputs: list[Any]) -> None:
    """Check that a session's inputs and outputs are those of the manifest.

    Parameters
    ----------
    manifest
        From `read_manifest`.
    inputs, outputs
        ``session.get_inputs()``, ``session.get_outputs()``.

    Raises
    ------
    ValueError
        If a tensor is missing or unknown, or has another dtype or shape.
    """
    path = manifest.folder / MODEL
    for wanted, given in (("inputs", inputs), ("outputs", outputs)):
        names, found = manifest.data[wanted], {node.name for node in given}
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{path}: lacks the {wanted} {missing}, which {MANIFEST} names")
        if unknown := sorted(found - set(names)):
            raise ValueError(f"{path}: has the {wanted} {unknown}, which {MANIFEST} does not name")
    by_name = {node.name: node for node in inputs}
    for spec in manifest.state:
        node = by_name[f"past.{spec.name}"]
        found_shape = tuple(node.shape[1:])
        if found_shape != spec.shape or node.type != _TYPES[spec.dtype]:
            raise ValueError(
                f"{path}: past.{spec.name} is {node.type} {found_shape} for each sequence, but "
                f"{MANIFEST} says {spec.dtype} {spec.shape}"
            )


def refuse_bfloat16(manifest: Manifest) -> None:
    """Refuse a model for which ONNX Runtime has no kernels.

    Raises
    ------
    ValueError
        If its dtype is bfloat16.
    """
    if manifest.config.dtype == "bfloat16":
        raise ValueError(
            f"{manifest.folder}: a bfloat16 model, which ONNX Runtime cannot run; export float32 "
            "or float16 for it. This one is for exporters.tensorrt.build_engines"
        )
