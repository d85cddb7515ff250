"""Texts with hidden keys: by seed, of the asked length, at the asked depth."""

import re

import pytest

from less_cache import reference_model
from less_cache.evaluation.needles import NOISE, STYLES, TASKS, make_example

CODE = [line for line in reference_model.held_out_documents()[0].text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def tokenizer():
    return reference_model.load()[1]


def example(tokenizer, task="passkey", **changes):
    settings = {"length": 400, "depth": 0.5, "style": "code", "seed": 0, **changes}
    filler = CODE if settings["style"] == "code" else NOISE
    return make_example(
        task,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        **{"filler": filler, **settings},
    )


@pytest.mark.parametrize("length", [200, 400, 900])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_as_long_as_lines_allow_and_have_what_is_asked(task, style, length, tokenizer):
    found = example(tokenizer, task, style=style, length=length)
    assert length - 40 < len(found.prompt) <= length
    prompt = tokenizer.decode(found.prompt)
    reference = tokenizer.decode(found.reference)
    for answer in found.answers:
        assert answer in prompt
        assert answer in reference
        # The end of the prompt gives nothing away.
        assert answer not in prompt[-len(answer) - 8 :]
    assert len(found.answers) == (5 if task == "variables" else 1)
    assert reference.strip(" .\n") == ", ".join(found.answers)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_depth_is_where_it_says(task, depth, tokenizer):
    found = example(tokenizer, task, depth=depth, length=900)
    lines = tokenizer.decode(found.prompt).splitlines()[:-1]
    wanted = found.answers[0]
    place = next(i for i, line in enumerate(lines) if re.search(rf"\b{wanted}\b", line))
    assert place / (len(lines) - 1) == pytest.approx(depth, abs=0.1)


@pytest.mark.parametrize("style", STYLES)
def test_chains_lead_from_the_number_to_each_variable(style, tokenizer):
    found = example(tokenizer, "variables", style=style, depth=0.2)
    prompt = tokenizer.decode(found.prompt)
    pairs = re.findall(r"(?:VAR )?([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\n", prompt)
    values = dict(pairs)
    assert [*values] == [*found.answers]
    assert [*values.values()][1:] == [*found.answers[:-1]]
    assert values[found.answers[0]] in prompt.splitlines()[-1]


def test_of_many_keys_one_is_asked_for(tokenizer):
    found = example(tokenizer, "multikey")
    prompt = tokenizer.decode(found.prompt)
    pairs = dict(re.findall(r"KEY_([A-Z]{5}) = (\d{5})\n", prompt))
    assert len(pairs) == 4
    assert f"KEY_{ {v: k for k, v in pairs.items()}[found.answers[0]] } =" in prompt[-20:]


def test_seeds_tell_texts_apart_and_make_them_again(tokenizer):
    assert example(tokenizer) == example(tokenizer)
    assert example(tokenizer, seed=1).answers != example(tokenizer).answers
    # The same number and filler hide at another depth.
    assert example(tokenizer, depth=0.0).answers == example(tokenizer).answers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 20, "task": "variables"}, "length: got 20, but what variables hides"),
        ({"depth": 1.5}, "depth: got 1.5"),
        ({"style": "verse"}, "style: got 'verse'"),
        ({"task": "other"}, "task: got 'other'"),
        ({"filler": []}, "filler: got no lines"),
        ({"filler": ["a", " "]}, "filler: got no lines"),
    ],
)
def test_what_cannot_be_made_is_told(changes, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        example(tokenizer, **changes)
