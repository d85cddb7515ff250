"""What lm-eval's `HFLM._loglikelihood_tokens` does with a model, as of lm-eval 0.4."""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional as F


def loglikelihoods(model, requests, *, batch, mixed=None):
    """Sum of a continuation's log-likelihoods after its context.

    Parameters
    ----------
    model
        A causal transformers model.
    requests
        Pairs of context and continuation, lists of token ids.
    batch
        Requests at a time, the longest first.
    mixed
        HFLM's `mixed_precision_dtype`.
    """
    order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
    answers = {}
    for start in range(0, len(order), batch):
        chunk = order[start : start + batch]
        inputs, lengths = [], []
        for i in chunk:
            context, continuation = requests[i]
            text = torch.tensor((context + continuation)[:-1], dtype=torch.long)
            inputs.append(text)
            lengths.append(len(text))
        width = max(lengths)
        # Padded on the right with zeros, and no mask.
        padded = torch.stack([F.pad(x, (0, width - len(x))) for x in inputs])
        precision = (
            contextlib.nullcontext() if mixed is None else torch.autocast("cpu", dtype=mixed)
        )
        with torch.no_grad(), precision:
            logits = model(padded).logits
        scores = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        for row, i in enumerate(chunk):
            continuation = torch.tensor(requests[i][1])
            stop = lengths[row]
            own = scores[row, stop - len(continuation) : stop]
            answers[i] = own.gather(1, continuation.unsqueeze(1)).sum().item()
    return [answers[i] for i in range(len(requests))]
