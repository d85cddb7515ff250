"""One layer's bases of codes as parameters, fitted through the codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layer_config import LayerConfig
from ..quantization.calibration import rounded
from ..quantization.layout import CodeLayout
from ..quantization.straight_through import read_back
from ..quantization.transforms import LayerTransforms, inverse


class LearnedBases:
    """Bases that begin as given and change with their parameters.

    A becomes ``A (1 + X)``, and m moves by what is y in the new basis, for keys and for values: an
    X of 0.01 means the same in every channel, whatever its size.

    Parameters
    ----------
    start
        Where they begin.
    device
        Of the parameters.

    Attributes
    ----------
    parameters
        By name: ``key_turn`` and ``value_turn`` [Hkv, D, D], X; ``key_shift`` and ``value_shift``
        [Hkv, 1, D], y, where there is a mean.
    """

    def __init__(self, start: LayerTransforms, device: Any) -> None:
        self.start = start
        self._start = start.to(device, torch.float32)
        kv_heads, size, _ = start.key_in.shape
        shapes = {"key_turn": (kv_heads, size, size), "value_turn": (kv_heads, size, size)}
        if start.key_mean is not None:
            shapes["key_shift"] = (kv_heads, 1, size)
        if start.value_mean is not None:
            shapes["value_shift"] = (kv_heads, 1, size)
        self.parameters = {
            name: torch.zeros(shape, device=device, requires_grad=True)
            for name, shape in shapes.items()
        }

    def stored_pairs(self, layer: LayerConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `teacher_forced.stored_pairs` with these bases, differentiable in the parameters.

        Parameters
        ----------
        layer
            How pairs are coded.
        k, v
            [B, Hkv, N, D], keys after the rotary embedding.
        """
        if layer.key_layout is None or layer.value_layout is None:
            raise ValueError("layer: its pairs are stored as they are")
        keys = self._through("key", layer.key_layout, self._start.enter_keys(k.float()))
        values = self._through("value", layer.value_layout, self._start.enter_values(v.float()))
        return self._start.leave_keys(keys), self._start.leave(values)

    def _through(self, name: str, layout: CodeLayout, u: Tensor) -> Tensor:
        """What codes make of numbers in the basis of the start, in that basis."""
        turn = self.parameters[f"{name}_turn"]
        turn = turn + torch.eye(turn.shape[1], device=turn.device)
        shift = self.parameters.get(f"{name}_shift")
        u = u @ turn
        read = read_back(layout, u) if shift is None else read_back(layout, u - shift) + shift
        return read @ torch.linalg.inv(turn)

    def finished(self, parameters: dict[str, Tensor]) -> LayerTransforms:
        """The bases that some values of the parameters make, rounded as files hold them."""
        wide = {name: x.detach().to("cpu", torch.float64) for name, x in parameters.items()}
        start = self.start.to("cpu", torch.float64)
        found: dict[str, Tensor | None] = {}
        for name in ("key", "value"):
            turn = wide[f"{name}_turn"]
            entry = rounded(getattr(start, f"{name}_in") @ (turn + torch.eye(turn.shape[1])))
            leave = inverse(entry)
            found[f"{name}_in"], found[f"{name}_out"] = entry, leave
            mean = getattr(start, f"{name}_mean")
            if mean is not None:
                mean = (mean + (wide[f"{name}_shift"] @ leave).squeeze(1)).float().double()
            found[f"{name}_mean"] = mean
        held: dict[str, Any] = found
        return LayerTransforms(**held)
