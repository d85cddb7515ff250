from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from less_cache.training.data import cut, load_tokens, read_documents, tokenize


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": [ord(letter) for letter in text]}


def test_a_folder_is_read_in_order_of_paths(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    (tmp_path / "d.txt").write_text("  \n")
    assert [text for _, text in read_documents(str(tmp_path))] == ["first", "second"]


def test_text_becomes_sequences(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij")
    tokens = load_tokens(str(path), Letters(), length=3, vocabulary=128)
    assert tokens.tolist() == [[97, 98, 99], [100, 101, 102], [103, 104, 105]]
    spread = load_tokens(str(path), Letters(), length=3, vocabulary=128, sequences=2)
    assert spread.tolist() == [[97, 98, 99], [103, 104, 105]]


def test_token_ids_need_no_tokenizer(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(12, dtype=np.uint16).reshape(3, 4))
    tokens = load_tokens(str(path), None, length=6, vocabulary=12)
    assert torch.equal(tokens, torch.arange(12).view(2, 6))


def test_a_dataset_is_imported_when_asked_for(monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    documents = read_documents("datasets:wiki:v1:test")
    assert calls == [("wiki", "v1", "test")]
    assert [text for _, text in documents] == ["one", "two"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: folder / "missing.txt", FileNotFoundError, "no file or folder"),
        (lambda folder: folder, ValueError, "no text"),
        (lambda folder: write(folder, b"\xff\xfe\xff"), ValueError, "UTF-8"),
        (lambda folder: write(folder, b"abc"), ValueError, "0 sequences of 4"),
        (lambda folder: write(folder, "ü".encode() * 20), ValueError, "vocabulary has 128"),
        (lambda folder: save(folder, np.zeros(9)), TypeError, "float64"),
        (lambda folder: save(folder, np.full(9, -1)), ValueError, "-1"),
        (lambda folder: write(folder, b"not numpy", "x.npy"), ValueError, "npy"),
        (lambda folder: folder / "missing.npy", FileNotFoundError, "missing.npy"),
        (lambda folder: save(folder, np.zeros((2, 2, 2), int)), ValueError, r"\(2, 2, 2\)"),
        (lambda folder: save(folder, np.zeros(0, int)), ValueError, "no text"),
        (lambda folder: "", ValueError, "empty name"),
        (lambda folder: "datasets:", ValueError, "datasets:NAME"),
        (lambda folder: made(folder / "ids.npy"), FileNotFoundError, "ids.npy is no file"),
    ],
)
def test_bad_data_is_refused(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        load_tokens(str(make(tmp_path)), Letters(), length=4, vocabulary=128)


def test_text_without_a_tokenizer_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokens(str(write(tmp_path, b"abc")), None, length=1, vocabulary=128)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"install less_cache\[train\]"):
        read_documents("datasets:wiki")


def test_more_sequences_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="expected at least 9"):
        cut(torch.arange(20), length=4, vocabulary=20, sequences=9)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"sequences": 0}, "sequences: got 0"),
        ({"sequences": -3}, "sequences: got -3"),
        ({"length": 0}, "length: got 0"),
    ],
)
def test_numbers_that_count_nothing_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        cut(torch.arange(20), **{"length": 4, "vocabulary": 20, **numbers})


def test_what_is_no_document_is_told():
    with pytest.raises(TypeError, match="documents: got an entry of type str, expected pairs"):
        load_tokens(["a text"], None, length=4, vocabulary=9)


def test_a_dataset_that_cannot_be_had_is_told(monkeypatch):
    def load_dataset(*given, **named):
        raise ConnectionError("no network\nand much more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"'datasets:wiki' cannot be loaded: no network$"):
        read_documents("datasets:wiki")


def test_rows_of_ids_are_documents(tmp_path):
    path = save(tmp_path, np.arange(12).reshape(3, 4))
    documents = tokenize(read_documents(str(path)), None, vocabulary=12)
    assert [name for name, _ in documents] == [f"{path}[{row}]" for row in range(3)]
    assert torch.equal(documents[1][1], torch.arange(4, 8))
    with pytest.raises(ValueError, match="vocabulary has 11"):
        tokenize(documents, None, vocabulary=11)


def made(folder):
    folder.mkdir()
    return folder


def write(folder, content, name="x.txt"):
    path = folder / name
    path.write_bytes(content)
    return path


def save(folder, array):
    path = folder / "x.npy"
    np.save(path, array)
    return path
