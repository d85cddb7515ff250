"""Where a request's passes end."""

from __future__ import annotations


def chunk_of(start: int, room: int, prompt: int, chunk: int) -> int:
    """How many tokens a request takes in from `start` on; 0: it waits for more room.

    Parameters
    ----------
    start
        Tokens that it has taken in.
    room
        Tokens that it could take in now.
    prompt
        Tokens of its prompt.
    chunk
        At multiples of which a pass ends.
    """
    if start >= prompt:
        return min(room, 1)
    wanted = min(prompt, (start // chunk + 1) * chunk) - start
    return wanted if room >= wanted else 0
