"""`export_decoder`: a model and its cache as a folder that ONNX runtimes run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import ir

from exporters.common.folders import check_target, is_inside, read_index, replaced_files
from exporters.common.manifest import FORMAT, MANIFEST, MODEL, WEIGHTS
from less_cache._checks import check_choice, check_int
from less_cache.config import CacheConfig
from less_cache.dtypes import dtype_name
from less_cache.feature_maps import FeatureMaps
from less_cache.manager import CacheManager
from less_cache.quantization.transforms import Transforms

from .assembly import assemble
from .decoder import trace_decoder
from .describing import write_manifest
from .heads import ModelLayer
from .layers import model_layers

DTYPES = ("float32", "float16", "bfloat16")
GENAI_CONFIG = "genai_config.json"
INDICES = (MANIFEST, GENAI_CONFIG)
"""One of these is in every folder that was exported."""

OPSETS = (20, 23)
"""The oldest has Gelu; the newest is the last that was tested."""


def export_decoder(
    model: Any,
    config: CacheConfig,
    maps: FeatureMaps | None,
    out_dir: str | Path,
    *,
    dtype: Any = None,
    opset: int = 23,
    all_logits: bool = False,
    tokenizer: Any = None,
    transforms: Transforms | None = None,
    force: bool = False,
) -> Path:
    """Write a model with its cache as one ONNX file, its weights beside it, and a manifest.

    The file serves prompts, steps, chunks and later turns alike: ``input_ids`` [B, S],
    ``attention_mask`` [B, S] (or [B, any length], of which the last S columns count), and the past
    state ``past.*`` -> ``logits`` [B, 1, vocabulary] of each row's last token, and ``present.*``.
    Positions follow from the state and the mask. An empty state is zeros, with -1 for positions.

    Parameters
    ----------
    model
        A causal language model that `less_cache.attach` takes, on the CPU. Its sliding-window
        layers become caches of their window's size.
    config
        The config of its full-attention layers.
    maps
        φ and ψ; needed where a layer's rank is above 0.
    out_dir
        The folder. Made if it is not there; files of an earlier export in it are replaced.
    dtype
        ``"float32"``, ``"float16"`` or ``"bfloat16"``, of weights, keys and values. ONNX Runtime
        runs the first two, TensorRT all. Default: the model's own.
    opset
        ONNX's opset, 20 to 23. The newest has operators for norms and rotary embeddings, and is a
        tenth faster on a CPU; an older runtime may need an older one.
    all_logits
        Give the logits of every token, [B, S, vocabulary].
    tokenizer
        Saved beside the model.
    transforms
        The bases of codes; needed where a layer has calibrated ones.
    force
        Write into a folder that holds something else, too, and replace files of the same names.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    TypeError, ValueError
        If the model is not supported, an argument does not fit it, or the folder holds something
        else than an earlier export. Nothing is written then.
    """
    check_target(Path(out_dir), INDICES, force)
    prepared = prepare(
        model, config, maps, transforms, dtype=dtype, opset=opset, all_logits=all_logits
    )
    with replaced_files(Path(out_dir), MANIFEST, earlier_files(Path(out_dir))) as folder:
        save(prepared, folder, tokenizer)
        write_manifest(
            folder,
            prepared.model,
            prepared.config,
            prepared.layers,
            maps,
            transforms,
            opset=opset,
            all_logits=all_logits,
        )
    return Path(out_dir)


@dataclass
class Prepared:
    """A model, ready to be saved.

    Attributes
    ----------
    model
        The transformers model, of the dtype asked for.
    config : CacheConfig
        The config, with that dtype.
    layers : list of ModelLayer
        The model's layers, in order.
    graph : onnx_ir.Model
        The graph to save.
    """

    model: Any
    config: CacheConfig
    layers: list[ModelLayer]
    graph: ir.Model


def prepare(
    model: Any,
    config: CacheConfig,
    maps: FeatureMaps | None,
    transforms: Transforms | None,
    *,
    dtype: Any,
    opset: int,
    all_logits: bool,
    dtypes: Sequence[str] = DTYPES,
) -> Prepared:
    """Check the arguments of `export_decoder`, and make its graph, of one of `dtypes`."""
    check_int("opset", opset, minimum=OPSETS[0], maximum=OPSETS[1])
    if not isinstance(config, CacheConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a CacheConfig")
    name = check_choice("dtype", dtype_name(dtype or getattr(model, "dtype", None)), dtypes)
    config = config.with_dtype(name)
    for i, policy in enumerate(config.policies):
        if policy.custom:
            raise ValueError(
                f"config: layer {i} has {policy}, whose scores are Python code of its own, which "
                "cannot be exported"
            )
    # It refuses maps and transforms that do not fit the config.
    CacheManager(config, maps, backend="torch", transforms=transforms)
    layers = model_layers(model, config, maps.kind if maps is not None else None)
    if {parameter.device.type for parameter in model.parameters()} != {"cpu"}:
        raise ValueError("model: not on the CPU, where it is exported; call model.to('cpu')")
    wanted = getattr(torch, name)
    if model.dtype != wanted:
        model = _converted(model, wanted)
    graph = trace_decoder(
        model, config, layers, maps, transforms, opset=opset, all_logits=all_logits
    )
    return Prepared(model, config, layers, assemble(graph, layers, opset))


def _converted(model: Any, dtype: torch.dtype) -> Any:
    """A copy in another dtype, as if it had been loaded in that dtype.

    Buffers that are computed instead of loaded stay as they are: rotary frequencies in 16 bits
    would give wrong angles far from the start.
    """
    model = copy.deepcopy(model)
    computed = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, name, buffer in computed:
        module._buffers[name] = buffer
    return model


def earlier_files(folder: Path) -> list[str]:
    """What a later export removes from a folder: the indices, and what an earlier one listed."""
    try:
        files = read_index(folder, MANIFEST, FORMAT, {}, "")["files"]
    except (OSError, ValueError):
        files = {}
    return [*INDICES, *filter(is_inside, files)]


def save(prepared: Prepared, folder: Path, tokenizer: Any) -> None:
    """Write the graph and its weights, the model's configurations and the tokenizer."""
    # Small constants stay in the graph, where shape inference can read them.
    ir.save(prepared.graph, folder / MODEL, external_data=WEIGHTS, size_threshold_bytes=1024)
    onnx.checker.check_model(str(folder / MODEL), full_check=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if getattr(prepared.model, "generation_config", None) is not None:
        prepared.model.generation_config.save_pretrained(folder)
    prepared.model.config.save_pretrained(folder)
