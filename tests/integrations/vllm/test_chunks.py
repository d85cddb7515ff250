from __future__ import annotations

import pytest

from less_cache.integrations.vllm.chunks import chunk_of


def passes(prompt, generated, chunk, room):
    """Where the passes of a request end, that takes in its prompt and what it generated."""
    ends, start = [], 0
    while start < prompt + generated:
        taken = chunk_of(start, min(room, prompt + generated - start), prompt, chunk)
        if not taken:
            return None
        start += taken
        ends.append(start)
    return ends


@pytest.mark.parametrize("room", [128, 130, 1000])
def test_passes_end_where_they_do_whatever_the_room(room):
    assert passes(300, 3, 128, room) == [128, 256, 300, 301, 302, 303]


def test_a_request_waits_for_room_for_a_whole_chunk():
    assert passes(300, 0, 128, 127) is None
    assert passes(100, 0, 128, 100) == [100]


def test_a_prompt_may_end_at_a_chunk():
    assert passes(256, 1, 128, 512) == [128, 256, 257]
