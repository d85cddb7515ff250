"""Known tokens attend as if they came one by one, with gradients: what a text's score needs.

A chunk of tokens in one call of `CacheManager.attend` sees all of itself, and is evicted at its
end. To score a text is to ask what a decoder would have said that evicts at every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arrays import EMPTY, LayerArrays
from .call import check_tokens, checked_mask
from .layer_config import LayerConfig, Run
from .layer_maps import LayerMaps
from .manager import CacheManager
from .quantization import codes
from .quantization.transforms import LayerTransforms, layer_transforms
from .state import CacheState, LayerState
from .teacher_forced import Past, attend_all, eviction_times, stored_pairs


# A compiler would unroll the tokens, and be at it for minutes.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_one_by_one(
    manager: CacheManager,
    state: CacheState,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """What S calls of `CacheManager.attend` with a token each give, differentiable.

    The state goes on from them as well. Costs S steps of the layer. Where gradients flow, a masked
    product of all S queries with C + S pairs follows: of a block of 256 queries at a time, whose
    weights the backward pass makes again.

    Parameters
    ----------
    manager, state, layer
        As of `CacheManager.attend`; the state is changed in place.
    q
        [B, Hq, S, D], after the rotary embedding.
    k, v
        [B, Hkv, S, D].
    mask
        [B, S], true or 1 at tokens; ``None``: no padding.

    Returns
    -------
    Tensor
        [B, Hq, S, D], zero at padding. Gradients flow into q, k, v and the manager's maps; none
        into what the state held, or through the choice of what leaves.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `CacheManager.attend`; the state is as it was then.
    """
    held, spec = state.layers[layer], state.config.layer(layer)
    check_tokens(spec, held.keys, len(held.length), q, k, v)
    mask = checked_mask(k, mask)
    maps = None if manager.maps is None else manager.maps[layer]
    basis = manager.transforms_of(layer)
    watches = None
    if torch.is_grad_enabled() and _needs_gradients(maps, q, k, v):
        watches = [_Watch(run, held, k.shape[2], mask, basis) for run in spec.runs]
    with torch.no_grad():
        out = _step_through(manager, state, layer, q, k, v, mask, watches)
    if watches is None:
        return out
    wide = getattr(torch, spec.score_dtype)
    parts = []
    for watch in watches:
        run = watch.run
        pairs = (k[:, run.kv_heads].to(wide), v[:, run.kv_heads].to(wide))
        parts.append(
            attend_all(
                run.layer,
                _maps_of(run, maps, k.device, wide),
                q[:, run.query_heads].to(wide),
                *pairs,
                watch.times(),
                mask=mask,
                past=watch.past(),
                stored=stored_pairs(run.layer, *pairs, watch.given),
            )
        )
    return torch.cat(parts, 1).to(q.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_from_empty(
    layer: LayerConfig,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    backend: str = "auto",
    transforms: LayerTransforms | None = None,
) -> Tensor:
    """What `attend_one_by_one` gives on an empty state that nobody keeps.

    Costs the policy's steps without the low-rank state, or what the backend has in their place (a
    window needs none), and the masked product.

    Parameters
    ----------
    layer, maps, q, k, v
        As of `teacher_forced.attend`.
    mask
        [B, S] booleans, false at padding; ``None``: no padding.
    backend
        As of `CacheManager`.
    transforms
        The bases of the layer's codes, where it has calibrated ones.
    """
    times = eviction_times(
        layer, q.detach(), k.detach(), mask, backend=backend, transforms=transforms
    )
    wide = torch.promote_types(k.dtype, torch.float32)
    if maps is not None:
        maps = maps.to(k.device, wide)
    k, v = k.to(wide), v.to(wide)
    stored = stored_pairs(layer, k, v, transforms)
    out = attend_all(layer, maps, q.to(wide), k, v, times, mask=mask, stored=stored)
    return out.to(q.dtype)


def _as_outer(
    layer: LayerConfig, arrays: LayerArrays, transforms: LayerTransforms | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and H as they are outside of the basis of codes; H as a copy."""
    basis = layer_transforms(layer, transforms)
    if basis is None or layer.key_layout is None or layer.value_layout is None:
        return arrays.keys, arrays.values, arrays.H.clone()
    wide = getattr(torch, layer.score_dtype)
    basis = basis.to(arrays.positions.device, wide)
    stored = arrays.named()
    keys, values = codes.decode_pairs(layer.key_layout, layer.value_layout, stored, wide)
    H = arrays.H.to(wide) @ basis.value_out
    if basis.value_mean is not None:
        H = H + arrays.z.to(wide).unsqueeze(3) * basis.value_mean.unsqueeze(1)
    return basis.leave_keys(keys), basis.leave(values), H.to(arrays.H.dtype)


def _needs_gradients(maps: LayerMaps | None, *inputs: Tensor) -> bool:
    learned = () if maps is None else maps.tensors.values()
    return any(x.requires_grad for x in (*inputs, *learned))


def _maps_of(
    run: Run, maps: LayerMaps | None, device: torch.device, wide: torch.dtype
) -> LayerMaps | None:
    return None if maps is None else maps.to(device, wide).heads(run.query_heads, run.kv_heads)


def _step_through(
    manager: CacheManager,
    state: CacheState,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    watches: list[_Watch] | None,
) -> Tensor:
    """The outputs of one token after another, [B, Hq, S, D]."""
    held = state.layers[layer]
    if not state.config.layer(layer).policy.evicts:
        # Nothing leaves: the chunk's outputs are the steps'.
        out = manager.attend(state, layer, q, k, v, mask)
        for watch in watches or ():
            watch.note(k.shape[2] - 1)
        return out
    before = {name: array.clone() for name, array in held.arrays().items()}
    outs = []
    try:
        for token in range(k.shape[2]):
            one = slice(token, token + 1)
            own = None if mask is None else mask[:, one]
            inputs = (q[:, :, one], k[:, :, one], v[:, :, one])
            outs.append(manager.attend(state, layer, *inputs, own))
            for watch in watches or ():
                watch.note(token)
    except BaseException:
        for name, array in held.arrays().items():
            array.copy_(before[name])
        raise
    return torch.cat(outs, 2)


class _Watch:
    """Notes when pairs leave a run of heads, those that it held before among them.

    Columns are the old pairs by age, the new ones in order, and a spare one for empty slots.
    """

    def __init__(
        self,
        run: Run,
        held: LayerState,
        tokens: int,
        mask: Tensor | None,
        transforms: LayerTransforms | None,
    ) -> None:
        self.run, self.held, self.tokens, self.mask = run, held, tokens, mask
        self.given = None if transforms is None else transforms.heads(run.kv_heads)
        self.length = held.length.clone().view(-1, 1, 1)
        arrays = held.of_run(run)
        batch, heads, capacity = arrays.positions.shape
        self.old = capacity if bool(self.length.any()) else 0
        self.before: Past | None = None
        if self.old:
            positions, order = arrays.positions.sort(2)
            self.positions = positions
            keys, values, H = _as_outer(run.layer, arrays, self.given)
            along = order.unsqueeze(3).expand_as(keys)
            self.before = Past(
                keys=keys.gather(2, along),
                values=values.gather(2, along),
                held=positions != EMPTY,
                times=positions,
                H=H,
                z=arrays.z.clone(),
            )
        # The last query that found the pair.
        shape = (batch, heads, self.old + tokens + 1)
        self.last = torch.full(shape, -1, dtype=torch.int32, device=arrays.keys.device)

    def note(self, token: int) -> None:
        """Say that the pairs held now were there for the query of `token`."""
        positions = self.held.of_run(self.run).positions.contiguous()
        column = self.old + positions - self.length
        if self.old:
            known = torch.searchsorted(self.positions, positions)
            column = torch.where(positions < self.length, known, column)
        column = column.masked_fill(positions == EMPTY, self.old + self.tokens).long()
        self.last.scatter_(2, column, torch.full_like(column, token, dtype=torch.int32))

    def times(self) -> Tensor:
        """[B, heads, S], as from `eviction_times`."""
        new = self.last[:, :, self.old : self.old + self.tokens] + 1
        if self.mask is None:
            return new
        # From the order of tokens to columns, between which there is padding.
        rank = (self.mask.cumsum(1) - 1).clamp_min_(0).unsqueeze(1).expand_as(new)
        own = torch.arange(self.tokens, dtype=new.dtype, device=new.device)
        return torch.where(self.mask.unsqueeze(1), new.gather(2, rank), own)

    def past(self) -> Past | None:
        """What there was before the new tokens."""
        if self.before is None:
            return None
        return self.before._replace(times=self.last[:, :, : self.old] + 1)
