"""Text from tokens: whole characters only, and nothing of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from examples.serve.detokenize import Detokenizer, StopStrings
from less_cache.reference_model import path

TOKENIZER = Tokenizer.from_file(str(path() / "tokenizer.json"))
SIZE = TOKENIZER.get_vocab_size()


def pieces(ids, prompt=()):
    detokenizer = Detokenizer(TOKENIZER, prompt)
    return [detokenizer.push(token) for token in ids]


@given(st.text(max_size=40), st.text(max_size=10))
def test_texts_come_back(text, prompt):
    text = text.replace("\ufffd", "").replace("<|endoftext|>", "")
    ids = TOKENIZER.encode(text).ids
    found = pieces(ids, TOKENIZER.encode(prompt).ids)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


@given(st.lists(st.integers(0, SIZE - 1), max_size=30))
def test_any_tokens_give_what_decoding_them_at_once_gives(ids):
    """Also such as are no text, but for a character that never ends."""
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids).rstrip("\ufffd")


def test_half_a_character_waits():
    ids = TOKENIZER.encode("a\N{SNOWMAN}b").ids
    assert len(ids) > 3
    found = pieces(ids)
    assert found[0] == "a"
    assert "" in found
    assert "".join(found) == "a\N{SNOWMAN}b"
    assert "".join(pieces(ids[:2])) == "a"


def test_half_a_character_at_the_prompts_end_is_the_prompts():
    ids = TOKENIZER.encode("\N{SNOWMAN}!").ids
    assert "".join(pieces(ids[1:], ids[:1])).endswith("!")


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_nothing_of_a_stop_string_is_shown(parts, stops):
    stream = StopStrings(stops)
    shown = "".join([stream.push(part) for part in parts]) + stream.flush()
    text = "".join(parts)
    # What comes first counts, at the moment it is complete.
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if stream.found:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == text


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_stop_string_across_borders(cut):
    stream = StopStrings(["END OF"])
    text = "x END OF it"
    assert stream.push(text[:cut]) + stream.push(text[cut:]) == "x "
    assert stream.push("more") == stream.flush() == ""
