"""Text from tokens as they come: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6


class Decodes(Protocol):
    """What is needed of `tokenizers.Tokenizer`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...
    def id_to_token(self, id: int) -> str | None: ...  # noqa: A002 - its name there


class Detokenizer:
    """The text that each further token adds.

    A token may end amid a character. What a decoder shows for such bytes, U+FFFD at the end, is
    held back until later tokens have completed it; at the end of an answer it is dropped.

    Parameters
    ----------
    tokenizer
        Decodes.
    prompt
        What came before: some tokenizers write a token differently where a text begins.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-CONTEXT_TOKENS:])
        if self._text().endswith(REPLACEMENT):
            # The prompt itself ends amid a character, whose length in text is not known yet.
            self._window.clear()
        # The window's first tokens, whose text is only context, and how much of it was given out.
        self._context = len(self._window)
        self._given = len(self._text())

    def push(self, token: int) -> str:
        """The text that `token` completes; often a word, sometimes nothing."""
        self._window.append(token)
        text = self._text()
        complete = text.rstrip(REPLACEMENT)
        new = complete[self._given :]
        self._given = max(self._given, len(complete))
        if len(complete) == len(text):
            # A border between characters: the window moves on, so that it stays short.
            del self._window[: self._context]
            self._context = len(self._window)
            self._given = len(self._text())
        return new

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)


class StopStrings:
    """Lets text through up to the first of some strings.

    The end of the text is held back while it may be the beginning of one of them.

    Parameters
    ----------
    strings
        None of them empty.

    Attributes
    ----------
    found : bool
        Whether one came; nothing comes after it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far may be shown, beyond what was shown before."""
        if self.found:
            return ""
        self._held += text
        starts = [i for s in self._strings if (i := self._held.find(s)) >= 0]
        if starts:
            self.found = True
            return self._release(min(starts))
        return self._release(len(self._held) - self._longest_beginning())

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _longest_beginning(self) -> int:
        longest = max((len(s) for s in self._strings), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(s.startswith(end) for s in self._strings):
                return length
        return 0
