"""Exported models for tests, and the attached torch model beside them."""

from __future__ import annotations

import numpy as np
import torch

import less_cache as lc
from exporters.onnx import OnnxDecoder, export_decoder
from tests.integrations.models import build, less, positions, prompts
from tests.quantization.fitted import fitted

CAPACITY = 8

CODED = {
    # Three runs of heads in the first layer, a low-rank state, means of keys and values.
    "calibrated": ("llama_mha", [[7, 7, 12, 7], 9], 4, lc.Quantization(3, 4, "calibrated"), {}),
    # Grouped queries, no low-rank state, 16 bits.
    "hadamard": ("llama", 8, 0, lc.Quantization(4, 2), {"dtype": "float16"}),
    # Means of keys, but no low-rank state that would ask for them.
    "rank 0": ("llama_one", 8, 0, lc.Quantization(3, 3, "calibrated"), {}),
    # A soft cap, and a sliding window, whose pairs are stored as they are.
    "windows": ("gemma2", 8, 4, lc.Quantization(8, 8), {"opset": 20}),
    # Layers of their own: stored as they are with a state, coded without one, both.
    "by layer": (
        "llama_three",
        [8, [7, 11], 9],
        [4, 0, 3],
        [None, lc.Quantization(3, 3), lc.Quantization(4, 2, "calibrated")],
        {},
    ),
}
"""Family, capacity, rank, quantization and the export's options of models with coded pairs."""


class TorchSide:
    """The attached model, fed like an `OnnxDecoder`."""

    def __init__(self, model, handle):
        self.model, self.cache = model, handle.new_cache()
        self.mask = None

    @torch.no_grad()
    def append(self, ids, mask):
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        place = positions(self.mask)[:, -ids.shape[1] :]
        out = self.model(
            ids, attention_mask=self.mask, position_ids=place, past_key_values=self.cache
        )
        last = (mask * torch.arange(mask.shape[1])).amax(1)
        return out.logits[torch.arange(len(ids)), last].float().numpy()


def compare(decoder, torch_side, lengths, steps, *, turn=3):
    """Greedy tokens of both sides, and how far logits were off: prompt, steps, a second turn."""
    ids, mask = prompts(lengths)
    state = decoder.new_state(len(lengths))
    tokens, worst = [], 0.0
    for step in range(steps):
        found = decoder.append(state, ids.numpy(), mask.numpy()).astype(np.float32)
        expected = torch_side.append(ids, mask)
        worst = max(worst, float(np.abs(found - expected).max()))
        chosen = found.argmax(1)
        np.testing.assert_array_equal(chosen, expected.argmax(1), err_msg=f"step {step}")
        tokens.append(chosen)
        width = turn if step == steps // 2 else 1
        ids = torch.from_numpy(chosen)[:, None].repeat(1, width)
        mask = torch.ones_like(ids)
    return worst


def attached(model, config, maps, transforms=None):
    return lc.attach(model, config, maps, backend="torch", transforms=transforms)


class CodedParts:
    """An exported model, and what it was made of."""

    def __init__(self, name, folder):
        family, capacity, rank, quantization, options = CODED[name]
        changes = {}
        if family == "gemma2":
            kinds = ["sliding_attention", "full_attention"]
            changes = {"num_hidden_layers": 2, "layer_types": kinds}
        if family == "llama_one":
            family, changes = "llama", {"num_hidden_layers": 1}
        if family == "llama_three":
            # With seed 0 a number lies at a level's edge, where another order of sums differs.
            family, changes = "llama", {"num_hidden_layers": 3, "seed": 1}
        self.model = build(family, **changes)
        self.config, self.maps = less(self.model, capacity=capacity, rank=rank or 4)
        self.config = self.config.replace(quantization=quantization, rank=rank)
        if not rank:
            self.maps = None
        codes = self.config.quantizations
        calibrated = any(own is not None and own.transform == "calibrated" for own in codes)
        self.transforms = fitted(self.config) if calibrated else None
        self.folder = export_decoder(
            self.model, self.config, self.maps, folder, transforms=self.transforms, **options
        )
        self.decoder = OnnxDecoder(self.folder, threads=1)
        self.half = options.get("dtype") == "float16"

    def attached(self):
        return attached(self.model, self.config, self.maps, self.transforms)
