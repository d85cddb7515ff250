"""Our two operators as nodes, and as functions whose bodies any ONNX runtime can run."""

from __future__ import annotations

from typing import Any

from onnxscript import ir

from less_cache import ops
from less_cache.layer_config import LayerConfig
from less_cache.quantization.settings import spelled_bits

from .building import Builder
from .chunk_body import chunk_body
from .parts import Layer, is_shifted
from .step_body import step_body

DOMAIN = "less_cache"

STEP = "LessAttention"
"""One new token of each sequence."""

CHUNK = "LessAttentionChunk"
"""Several new tokens, which may include padding: a prompt, a chunk of one, a later turn."""


def node_inputs(layer: LayerConfig, kind: str | None) -> list[str]:
    """Names of both operators' inputs, in order.

    ``q`` [B, Hq, S, D] · ``k``, ``v`` [B, Hkv, S, D] · ``mask`` [B, S] int32 ·
    ``length`` [B] int32, the tokens seen before · the state's arrays · the maps' parameters.

    Of a quantised layer ``q``, ``k`` and ``v``, and the output, are float32 and in the basis of
    the codes, and the maps are folded into it. In a calibrated one they have one parameter more,
    and last comes ``shift`` [B, Hq, S] float32, what is added to the queries' products.
    """
    names = ["q", "k", "v", "mask", "length", *ops.state_names(layer), *map_inputs(layer, kind)]
    return [*names, "shift"] if is_shifted(layer, kind) else names


def map_inputs(layer: LayerConfig, kind: str | None) -> list[str]:
    """The maps' parameters, in order."""
    names = [*ops.map_names(kind)]
    return [*names, ops.FOLDED_BIAS] if is_shifted(layer, kind) else names


def node_outputs(layer: LayerConfig) -> list[str]:
    """Names of both operators' outputs, in order: ``out`` [B, Hq, S, D], and the new state."""
    return ["out", *ops.state_names(layer)]


def node_attributes(layer: LayerConfig, kind: str | None) -> dict[str, Any]:
    """What a plugin needs to know to take the body's place; the body has it built in.

    ``start`` and ``gain`` are numbers of `less_cache.policies.Start` and `Gain`, ``softcap`` is 0
    if there is none, ``maps`` is ``"none"`` at rank 0. Only quantised layers have ``key_bits``,
    ``value_bits``, ``transform`` and ``model_dtype``, which the queries do not tell there. Bits are
    a text: ``"3"``, or those of each eighth of the channels.
    """
    policy, quantization = layer.policy, layer.quantization
    coded: dict[str, Any] = {}
    if quantization is not None:
        coded = {
            "key_bits": spelled_bits(quantization.key_bits),
            "value_bits": spelled_bits(quantization.value_bits),
            "transform": quantization.transform,
            "model_dtype": layer.dtype,
        }
    return {
        "plugin_version": "1",
        "plugin_namespace": "",
        "start": int(policy.starts),
        "gain": int(policy.gains),
        "sinks": policy.sinks,
        "recent": policy.protected_recent,
        "decay": float(policy.decay),
        "window": policy.history_window,
        "capacity": layer.capacity,
        "rank": layer.rank,
        "maps": kind or "none",
        "scale": float(layer.scale),
        "softcap": float(layer.softcap or 0.0),
        **coded,
    }


def function(name: str, layer: Layer, opset: int, overload: str) -> ir.Function:
    """The function that defines `STEP` or `CHUNK` for one kind of layer.

    Parameters
    ----------
    name
        Which of the two it defines.
    layer
        Shapes, policy and maps' kind.
    opset
        The body's.
    overload
        A name that keeps the bodies of different layers apart; ``""`` for the first.
    """
    config = layer.config
    inputs = [ir.Value(name=key) for key in node_inputs(config, layer.kind)]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name=name)
    build = Builder(graph, "n")
    given = {str(value.name): value for value in inputs}
    if name == STEP:
        outputs = step_body(build, layer, given)
    else:
        outputs = chunk_body(build, layer, given, opset)
    for value, key in zip(outputs, node_outputs(config), strict=True):
        # An array that the policy does not change is still an input here; outputs need nodes.
        result = build("Identity", value) if value in inputs else value
        result.name = f"present_{key}"
        graph.outputs.append(result)
    attributes = [
        ir.Attr(key, _attribute_type(value), value)
        for key, value in node_attributes(config, layer.kind).items()
    ]
    return ir.Function(DOMAIN, name, overload, graph=graph, attributes=attributes)


def _attribute_type(value: Any) -> ir.AttributeType:
    if isinstance(value, str):
        return ir.AttributeType.STRING
    return ir.AttributeType.FLOAT if isinstance(value, float) else ir.AttributeType.INT
