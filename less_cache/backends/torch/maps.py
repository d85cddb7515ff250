"""φ of a step's queries and ψ of its victims in one product.

A decode step has a handful of rows a head: what it costs is the number of operators, not what they
compute. So the two maps' weights stand behind one another, and both run at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...layer_maps import EXPONENT_LIMIT, FIRST_LAYERS, LayerMaps


@dataclass(frozen=True)
class JoinedMaps(LayerMaps):
    """One layer's maps, their first layers joined along the heads.

    Parameters
    ----------
    w1
        [Hq + Hkv, D, hidden], `phi_w1` and `psi_w1`.
    w2
        [Hq + Hkv, hidden, R], likewise.
    first_bias
        [Hq + Hkv, hidden], what is added before the activation; zero for φ.
    bias
        [Hq + Hkv, 1, R], what is added to the features of the ``"exp"`` kind; zero for φ.
    """

    w1: Tensor
    w2: Tensor
    first_bias: Tensor | None
    bias: Tensor | None

    def both(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """φ(queries) [B, Hq, 1, R] and ψ(keys) [B, Hkv, 1, R].

        Parameters
        ----------
        queries
            [B, Hq, 1, D].
        keys
            [B, Hkv, 1, D].
        """
        features = self.two_layers(torch.cat([queries, keys], 1), self.w1, self.w2, self.first_bias)
        heads = queries.shape[1]
        if self.bias is None:
            return self.finish_phi(features[:, :heads]), self.finish_psi(features[:, heads:])
        features = (features + self.bias).clamp_(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp_()
        return features[:, :heads], features[:, heads:]


def join(maps: LayerMaps) -> JoinedMaps:
    """The same maps with their first layers joined; the separate ones become views of these."""
    t = maps.tensors
    w1 = torch.cat([t["phi_w1"], t["psi_w1"]])
    w2 = torch.cat([t["phi_w2"], t["psi_w2"]])
    heads = t["phi_w1"].shape[0]
    views = (w1[:heads], w2[:heads], w1[heads:], w2[heads:])
    tensors = {**t, **dict(zip(FIRST_LAYERS, views, strict=True))}
    bias = None
    if maps.kind == "exp":
        none = torch.zeros_like(t["psi_b"][:1]).expand(heads, -1)
        bias = torch.cat([none, t["psi_b"]]).unsqueeze(1)
    first_bias = None
    if "psi_b1" in t:
        first_bias = torch.cat([t["psi_b1"].new_zeros(heads, w1.shape[2]), t["psi_b1"]])
    return JoinedMaps(maps.kind, tensors, w1, w2, first_bias, bias)
