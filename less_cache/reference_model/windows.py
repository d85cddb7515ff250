"""Windows of the context's length, cut from long documents in a reproducible order."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from less_cache.reference_model.architecture import generator
from less_cache.reference_model.data import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def token_streams(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerFast", context: int
) -> list[torch.Tensor]:
    """Encode documents into streams that windows are cut from.

    A long document is a stream of its own, so that a window shows one subject; the short ones
    share the last stream.

    Parameters
    ----------
    documents : sequence of Document
        The text.
    tokenizer : PreTrainedTokenizerFast
        The tokenizer.
    context : int
        Tokens in a window.

    Returns
    -------
    list of Tensor
        Token numbers, at least `context + 1` a stream.
    """
    end = tokenizer.eos_token_id
    streams, short = [], []
    for encoding in tokenizer.backend_tokenizer.encode_batch([d.text for d in documents]):
        ids = [end, *encoding.ids]
        if len(ids) > 2 * context:
            streams.append(torch.tensor([*ids, end]))
        else:
            short.extend(ids)
    if len(short) > context:
        streams.append(torch.tensor(short))
    return streams


class Windows:
    """Every epoch's windows of the text, in an order that depends on seed and epoch alone."""

    def __init__(self, streams: Sequence[torch.Tensor], context: int, seed: int) -> None:
        self.streams, self.context, self.seed = list(streams), context, seed
        self._orders: dict[int, list[tuple[int, int]]] = {}
        # The shortest epoch bounds the number of windows, so that all epochs have as many.
        self.count = sum(max(1, (len(s) - context) // context) for s in self.streams)

    def _order(self, epoch: int) -> list[tuple[int, int]]:
        if epoch not in self._orders:
            draws = generator(self.seed, 1, epoch)
            places = []
            for number, stream in enumerate(self.streams):
                room = min(self.context, len(stream) - self.context)
                offset = int(torch.randint(room, (1,), generator=draws))
                last = len(stream) - self.context - 1
                places += [(number, at) for at in range(offset, last + 1, self.context)]
            order = torch.randperm(len(places), generator=draws).tolist()
            self._orders = {epoch: [places[i] for i in order[: self.count]]}
        return self._orders[epoch]

    def batch(self, step: int, size: int) -> torch.Tensor:
        """Return the windows of one step, `[size, context + 1]`.

        Parameters
        ----------
        step : int
            Number of the step, from 0.
        size : int
            Number of windows.
        """
        rows = []
        for index in range(step * size, (step + 1) * size):
            number, at = self._order(index // self.count)[index % self.count]
            rows.append(self.streams[number][at : at + self.context + 1])
        return torch.stack(rows)
