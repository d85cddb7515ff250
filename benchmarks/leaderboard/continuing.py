"""What a cache makes of a text's continuation after a prompt that it took in one call.

Nothing of `less_cache` is imported: this runs in the peers' environment, too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Opened = Callable[[], AbstractContextManager[Callable[[], Any]]]
"""Opens a way of caching; inside, a call makes an empty cache."""


@dataclass(frozen=True)
class Entrant:
    """A cache to be measured.

    Parameters
    ----------
    name
        What the table calls it.
    share
        Of the full cache's bytes that it was given, in percent; "" where it takes what it takes.
    opened
        Makes empty caches. It is opened anew for each prompt and each continuation.
    nbytes
        What a filled cache takes for one sequence, numbers that are not coded as 16 bits; given the
        cache and how many sequences are in it.
    grows
        Whether it takes more with every token.
    copies
        Whether a cache can be copied; else the prompt is read twice.
    """

    name: str
    share: str
    opened: Opened
    nbytes: Callable[[Any, int], int]
    grows: bool
    copies: bool = True


@torch.no_grad()
def measure(
    model: Any,
    windows: Sequence[Sequence[int]],
    entrant: Entrant,
    *,
    prompt: int,
    new_tokens: int,
    batch: int,
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Losses on each continuation, a greedy one, bytes in the end, and seconds.

    The prompt goes in whole, and all of it sees all of it; its last logits foresee the first token.
    The others come one by one. The last token is read, too, so that the bytes are those of a full
    window.

    Parameters
    ----------
    model
        A transformers model.
    windows
        Token ids, all equally many.
    entrant
        The cache.
    prompt
        Tokens of a window that are its prompt.
    new_tokens
        Of the greedy continuation.
    batch
        Windows at a time.
    told
        Called with the number of windows that were just measured.

    Returns
    -------
    dict
        JSON-ready: ``losses`` of each window's continuation in nats, ``greedy`` tokens, ``bytes``
        of one sequence of the windows' length, ``grows``, and the processor's seconds of one thread
        for a window's prompt and for one step of one window.
    """
    losses: list[list[float]] = []
    greedy: list[list[int]] = []
    nbytes = 0
    prompt_seconds = step_seconds = 0.0
    for ids in torch.tensor(windows).split(batch):
        # The processor's own clock: what else the machine does counts little.
        started = time.thread_time()
        cache, first = _read(model, entrant, ids[:, :prompt])
        prompt_seconds += time.thread_time() - started
        kept = copy.deepcopy(cache) if entrant.copies else None
        started = time.thread_time()
        logits = _fed(model, entrant, cache, ids[:, prompt:], prompt)
        step_seconds += time.thread_time() - started
        found = torch.cat([first, logits[:, :-1]], 1).log_softmax(2)
        nats = -found.gather(2, ids[:, prompt:].unsqueeze(2)).squeeze(2)
        losses += [[round(x, 5) for x in row] for row in nats.tolist()]
        nbytes = max(nbytes, entrant.nbytes(cache, len(ids)))
        if kept is None:
            kept, first = _read(model, entrant, ids[:, :prompt])
        greedy += _greedy(model, entrant, kept, first, prompt, new_tokens).tolist()
        told(len(ids))
    steps = len(windows) * (len(windows[0]) - prompt)
    return {
        "losses": losses,
        "greedy": greedy,
        "bytes": nbytes,
        "grows": entrant.grows,
        "prompt_seconds": prompt_seconds / len(windows),
        "step_seconds": step_seconds / steps,
    }


def tensor_bytes(held: Any) -> int:
    """Bytes of the tensors in something, floats counted as 16 bits."""
    if isinstance(held, dict):
        return sum(map(tensor_bytes, held.values()))
    if isinstance(held, (list, tuple)):
        return sum(map(tensor_bytes, held))
    if not isinstance(held, Tensor):
        return 0
    if hasattr(held, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(held, name)) for name in held.__tensor_flatten__()[0])
    return held.numel() * min(2, held.itemsize) if held.is_floating_point() else held.nbytes


def cache_bytes(cache: Any, sequences: int) -> int:
    """What one sequence takes in a cache of transformers."""
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    held = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return tensor_bytes(held) // sequences


def _read(model: Any, entrant: Entrant, ids: Tensor) -> tuple[Any, Tensor]:
    """A cache that has taken a prompt, and the logits [B, 1, V] after it."""
    with entrant.opened() as empty:
        cache = empty()
        return cache, _called(model, cache, ids, 0)


def _fed(model: Any, entrant: Entrant, cache: Any, ids: Tensor, start: int) -> Tensor:
    """Logits [B, n, V] after each of the tokens, fed one by one."""
    with entrant.opened():
        return torch.cat(
            [
                _called(model, cache, token, start + place)
                for place, token in enumerate(ids.split(1, 1))
            ],
            1,
        )


def _greedy(
    model: Any, entrant: Entrant, cache: Any, first: Tensor, start: int, count: int
) -> Tensor:
    """The likeliest tokens [B, count], each fed in turn."""
    tokens = [first.argmax(2)]
    with entrant.opened():
        for place in range(count - 1):
            tokens.append(_called(model, cache, tokens[-1], start + place).argmax(2))
    return torch.cat(tokens, 1)


def _called(model: Any, cache: Any, ids: Tensor, start: int) -> Tensor:
    """The last logits [B, 1, V]; places are told, since a cache may hold fewer than it has seen."""
    places = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
    return model(ids, past_key_values=cache, position_ids=places, logits_to_keep=1).logits
