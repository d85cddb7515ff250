"""A transformers model and its cache as one function of tensors, traced to a graph."""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import ir
from torch import Tensor, nn

from less_cache import ops
from less_cache.config import CacheConfig
from less_cache.feature_maps import FeatureMaps
from less_cache.integrations.transformers.interception import intercepted
from less_cache.integrations.transformers.model_check import attention_modules, decoder_of
from less_cache.state import allocate

from .parts import Layer
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
    all_logits
        Give the logits of every token instead of each row's last one.
    """

    def __init__(
        self, model: Any, layers: list[Layer], maps: FeatureMaps | None, all_logits: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.all_logits = all_logits
        self.maps = nn.ModuleList()
        given = iter(maps or ())
        for layer in layers:
            held = nn.ParameterList()
            if layer.kind is not None:
                dtype = getattr(torch, layer.config.dtype)
                tensors = next(given).to("cpu", dtype).tensors
                held.extend(
                    nn.Parameter(tensors[name], requires_grad=False)
                    for name in ops.map_names(layer.kind)
                )
            self.maps.append(held)
        # Set by `forward`; `attend` reads and extends them, layer by layer.
        self.past: list[list[Tensor]] = []
        self.present: list[list[Tensor]] = []
        self.mask = self.length = torch.empty(0)

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors that `output_names` names, from those that `input_names` names."""
        ids, attention_mask, self.length, *arrays = tensors
        self.mask = (attention_mask != 0).to(torch.int32)
        ranks = self.mask.cumsum(1, dtype=torch.int32)
        positions = (self.length.unsqueeze(1) + ranks - 1).clamp_min(0).to(torch.int64)
        self.past, self.present = [], []
        for layer in self.layers:
            count = len(ops.state_names(layer.config))
            self.past.append(arrays[:count])
            arrays = arrays[count:]
        logits = self.model(
            input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).logits
        length = self.length + self.mask.sum(1, dtype=torch.int32)
        return [logits, length, *(array for layer in self.present for array in layer)]

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer's attention: a single operator."""
        layer = self.layers[index]
        out, *state = ops.append(
            q,
            k,
            v,
            self.mask,
            self.length,
            self.past[index],
            list(self.maps[index].parameters()),
            ops.layer_spec(layer.config, layer.kind),
        )
        self.present.append(state)
        return out

    def keep_last(self, module: Any, args: Any, output: Any) -> None:
        """Keep only the hidden state of each row's last token, before the head sees it."""
        hidden = output.last_hidden_state
        column = torch.arange(hidden.shape[1], dtype=torch.int32, device=hidden.device)
        last = (self.mask * column).amax(1).to(torch.int64)
        index = last.view(-1, 1, 1).expand(-1, 1, hidden.shape[2])
        output.last_hidden_state = hidden.gather(1, index)


def state_tensors(layers: list[Layer]) -> dict[str, Tensor]:
    """An empty state of two sequences, by name without ``past.`` and ``present.``."""
    tensors = {"length": torch.zeros(2, dtype=torch.int32)}
    for i, layer in enumerate(layers):
        arrays = allocate(layer.config, 2)
        for name in ops.state_names(layer.config):
            tensors[f"{i}.{name}"] = getattr(arrays, name)
    return tensors


def trace_decoder(
    model: Any,
    config: CacheConfig,
    layers: list[Layer],
    maps: FeatureMaps | None,
    *,
    opset: int,
    all_logits: bool,
) -> ir.Model:
    """The graph of `Decoder`, each layer's attention one `tracing.APPEND` node."""
    wrapper = Decoder(model, layers, maps, all_logits)
    tokens = torch.ones(2, 3, dtype=torch.int64)
    state = state_tensors(layers)
    # A copy: the tracer would take one tensor given twice for one input.
    inputs = {"input_ids": tokens, "attention_mask": tokens.clone()}
    inputs.update({f"past.{name}": tensor for name, tensor in state.items()})
    dynamic = {name: {0: BATCH} for name in inputs}
    for name in ("input_ids", "attention_mask"):
        dynamic[name][1] = SEQUENCE
    outputs = ["logits", *(f"present.{name}" for name in state)]
    with intercepted(model, wrapper.attend, config=config, sliding=True, padding=True):
        last = decoder_of(model, attention_modules(model)).register_forward_hook(wrapper.keep_last)
        try:
            if all_logits:
                last.remove()
            return trace(wrapper, inputs, outputs, dynamic, opset)
        finally:
            last.remove()
