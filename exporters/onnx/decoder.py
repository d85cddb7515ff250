"""A transformers model and its cache as one function of tensors, traced to a graph."""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import ir
from torch import Tensor, nn

from less_cache import ops
from less_cache.arrays import empty_arrays
from less_cache.config import CacheConfig
from less_cache.feature_maps import FeatureMaps
from less_cache.integrations.transformers.interception import intercepted
from less_cache.integrations.transformers.model_check import attention_modules, decoder_of
from less_cache.quantization.transforms import Transforms

from .bases import Bases
from .experts import traceable_experts
from .heads import ModelLayer
from .nodes import map_inputs
from .parts import is_shifted
from .positions import stateless_positions
from .tracing import trace

BATCH, SEQUENCE = "batch", "sequence"


class Decoder(nn.Module):
    """``(input_ids, attention_mask, past) -> (logits, present)``.

    Parameters
    ----------
    model
        The transformers model.
    layers
        From `layers.model_layers`.
    maps
        Those of the layers that have maps, in order.
    transforms
        The calibrated bases of the layers that have some, in order.
    all_logits
        Give the logits of every token instead of each row's last one.
    """

    def __init__(
        self,
        model: Any,
        layers: list[ModelLayer],
        maps: FeatureMaps | None,
        transforms: Transforms | None,
        all_logits: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.all_logits = all_logits
        # By the names of runs; a module sees parameters only in lists of its own.
        self.maps: dict[str, nn.ParameterList] = {}
        given = (own for own in maps or () if own is not None)
        self.bases = Bases(layers, transforms)
        for layer in layers:
            own = None
            if layer.kind is not None:
                own = self.bases.fold(layer, next(given))
            for run in layer.runs:
                held = self.maps[run.name] = nn.ParameterList()
                if own is not None:
                    tensors = own.heads(run.run.query_heads, run.run.kv_heads).tensors
                    held.extend(
                        nn.Parameter(tensors[name], requires_grad=False)
                        for name in map_inputs(layer.config, layer.kind)
                    )
        self.maps_held = nn.ModuleList(self.maps.values())
        # Set by `forward`; `attend` reads the one and extends the other, run by run.
        self.past: dict[str, list[Tensor]] = {}
        self.present: dict[str, list[Tensor]] = {}
        self.mask = self.length = torch.empty(0)

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors that `output_names` names, from those that `input_names` names."""
        ids, attention_mask, self.length, *arrays = tensors
        self.mask = (attention_mask != 0).to(torch.int32)
        ranks = self.mask.cumsum(1, dtype=torch.int32)
        positions = (self.length.unsqueeze(1) + ranks - 1).clamp_min(0).to(torch.int64)
        self.past, self.present = {}, {}
        for layer in self.layers:
            for run in layer.runs:
                count = len(run.arrays)
                self.past[run.name], arrays = arrays[:count], arrays[count:]
        logits = self.model(
            input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).logits
        length = self.length + self.mask.sum(1, dtype=torch.int32)
        return [logits, length, *(array for run in self.present.values() for array in run)]

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer's attention: a single operator for each run of heads of equal capacity."""
        layer, dtype = self.layers[index], q.dtype
        q, k, v, shift = self.bases.enter(index, q, k, v)
        if not is_shifted(layer.config, layer.kind):
            shift = None
        outs = []
        for run in layer.runs:
            heads = run.run
            out, *state = ops.functional_step(
                q[:, heads.query_heads],
                k[:, heads.kv_heads],
                v[:, heads.kv_heads],
                self.mask,
                self.length,
                self.past[run.name],
                list(self.maps[run.name]),
                ops.layer_spec(run.layer.config, layer.kind),
                None if shift is None else shift[:, heads.query_heads],
            )
            self.present[run.name] = state
            outs.append(out)
        joined = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
        return self.bases.leave(index, joined, self.mask).to(dtype)

    def keep_last(self, module: Any, args: Any, output: Any) -> None:
        """Keep only the hidden state of each row's last token, before the head sees it."""
        hidden = output.last_hidden_state
        column = torch.arange(hidden.shape[1], dtype=torch.int32, device=hidden.device)
        last = (self.mask * column).amax(1).to(torch.int64)
        index = last.view(-1, 1, 1).expand(-1, 1, hidden.shape[2])
        output.last_hidden_state = hidden.gather(1, index)


def state_tensors(layers: list[ModelLayer]) -> dict[str, Tensor]:
    """An empty state of two sequences, by name without ``past.`` and ``present.``."""
    tensors = {"length": torch.zeros(2, dtype=torch.int32)}
    for layer in layers:
        arrays = empty_arrays(layer.config, 2)
        for run in layer.runs:
            dense = arrays.of_run(run.run).named()
            tensors.update({full: dense[name].contiguous() for name, full in run.arrays.items()})
    return tensors


def trace_decoder(
    model: Any,
    config: CacheConfig,
    layers: list[ModelLayer],
    maps: FeatureMaps | None,
    transforms: Transforms | None,
    *,
    opset: int,
    all_logits: bool,
) -> ir.Model:
    """The graph of `Decoder`, the attention of each run of heads one `tracing.APPEND` node.

    Raises
    ------
    ValueError
        If torch or its exporter cannot make a graph of the model.
    """
    wrapper = Decoder(model, layers, maps, transforms, all_logits)
    tokens = torch.ones(2, 3, dtype=torch.int64)
    state = state_tensors(layers)
    # A copy: the tracer would take one tensor given twice for one input.
    inputs = {"input_ids": tokens, "attention_mask": tokens.clone()}
    inputs.update({f"past.{name}": tensor for name, tensor in state.items()})
    dynamic = {name: {0: BATCH} for name in inputs}
    for name in ("input_ids", "attention_mask"):
        dynamic[name][1] = SEQUENCE
    outputs = ["logits", *(f"present.{name}" for name in state)]
    with (
        intercepted(model, wrapper.attend, config=config, sliding=True, padding=True),
        stateless_positions(model),
        traceable_experts(model),
    ):
        last = decoder_of(model, attention_modules(model)).register_forward_hook(wrapper.keep_last)
        try:
            if all_logits:
                last.remove()
            return trace(wrapper, inputs, outputs, dynamic, opset)
        except torch.onnx.errors.OnnxExporterError as error:
            reason: BaseException = error
            while reason.__cause__ is not None:
                reason = reason.__cause__
            line = (str(reason).strip() or type(reason).__name__).splitlines()[0]
            raise ValueError(
                f"model: {model.config.model_type} cannot be exported; torch cannot make a graph "
                f"of it: {line}"
            ) from error
        finally:
            last.remove()
