"""Rows that come and go."""

import numpy as np
import pytest

from examples.serve.batch import RowBatch

PROMPTS = [[5, 6, 7, 8], list(range(100, 190)), [900], list(range(40, 60))]


def read(decoder, prompt):
    state = decoder.new_state(1)
    return state, int(decoder.append(state, np.array([prompt])).argmax())


def alone(decoder, prompt, steps):
    batch = RowBatch(decoder, 1)
    state, token = read(decoder, prompt)
    batch.join(state)
    logits = []
    for _ in range(steps):
        logits.append(batch.step([token])[0])
        token = int(logits[-1].argmax())
    return logits


def test_a_row_gives_the_same_bits_whoever_is_beside_it(model):
    """Rows join and leave, first and last ones, and those that stay do not notice."""
    decoder = model.decoder
    expected = [alone(decoder, prompt, 12) for prompt in PROMPTS]
    batch = RowBatch(decoder, 3)
    rows = []  # (prompt, next token, steps made), as the batch has them

    def join(number):
        state, token = read(decoder, PROMPTS[number])
        assert batch.join(state) == len(rows)
        rows.append([number, token, 0])

    def leave(row):
        batch.leave(row)
        last = rows.pop()
        if row < len(rows):
            rows[row] = last

    def step():
        for row, logits in zip(rows, batch.step([row[1] for row in rows]), strict=True):
            np.testing.assert_array_equal(logits, expected[row[0]][row[2]])
            row[1:] = int(logits.argmax()), row[2] + 1

    changes = [
        lambda: join(0),
        lambda: join(1),
        lambda: (leave(0), join(2)),
        lambda: join(3),
        lambda: leave(1),
        lambda: (leave(1), join(0)),
    ]
    for change in changes:
        change()
        step()
        step()
    assert batch.rows == 2


def test_rows_are_bounded(model):
    batch = RowBatch(model.decoder, 2)
    state, _ = read(model.decoder, [1])
    batch.join(state)
    batch.join(state)
    with pytest.raises(RuntimeError, match="all 2 rows are taken"):
        batch.join(state)
    with pytest.raises(IndexError, match="row: got 2, expected 0 to 1"):
        batch.leave(2)
    assert batch.nbytes == 2 * model.bytes_per_row


def test_other_devices_are_refused(model):
    class Elsewhere:
        placement = type("Placement", (), {"device": "cuda"})

    with pytest.raises(ValueError, match="runs on 'cuda', expected 'cpu'"):
        RowBatch(Elsewhere(), 2)
