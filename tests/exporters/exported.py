"""Exported models for tests, and the attached torch model beside them."""

from __future__ import annotations

import numpy as np
import torch

import less_cache as lc
from tests.integrations.models import positions, prompts

CAPACITY = 8


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
