"""The data of the paper's tables, from files and by way of a stand-in for `datasets`."""

import json
import sys
import types

import pytest

from less_cache.evaluation.paper import TABLES
from less_cache.evaluation.paper_data import articles_of, texts_of


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def hub(monkeypatch):
    """`datasets`, whose sets have three rows a split that say where they come from."""
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split))
        if "pg19" in name:
            raise OSError("no network\nat all")
        for i in range(3):
            told = f"{split} {i} a , b"
            yield {"page": told, "text": told, "article": told, "highlights": f"so {told}"}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_documents_by_name(hub):
    found = texts_of(TABLES["wikitext"], None, 2)
    # Words are counted before the marks are taken out.
    assert [(entry.text, entry.words) for entry in found] == [
        ("test 0 a, b", 5),
        ("test 1 a, b", 5),
    ]
    assert hub == [("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test")]
    assert [entry.text for entry in texts_of(TABLES["c4"], None, None)][2] == "validation 2 a , b"


def test_articles_by_name_have_examples_from_the_training_split(hub):
    (first, _) = articles_of(TABLES["cnn"], None, 2, 1)
    ask = "\n\nSummarize the above article in 3 sentences.\n"
    assert first.prompt == (
        f"###\nArticle: train 0 a , b{ask}so train 0 a , b\n\n###\nArticle: test 0 a , b{ask}"
    )
    assert first.summary == "so test 0 a , b"


def test_what_cannot_be_had_is_told(hub, monkeypatch):
    with pytest.raises(ValueError, match=r"'emozilla/pg19' cannot be loaded: no network$"):
        texts_of(TABLES["pg19"], None, None)
    monkeypatch.setattr(
        sys.modules["datasets"], "load_dataset", lambda *_, **__: iter([{"other": 1}])
    )
    with pytest.raises(ValueError, match="expected article and highlights or document"):
        articles_of(TABLES["xsum"], None, None, 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"install less_cache\[paper\]"):
        texts_of(TABLES["c4"], None, None)


def test_documents_from_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One , two")
    assert texts_of(TABLES["c4"], str(path), None)[0].text == "One , two"
    assert texts_of(TABLES["wikitext"], str(path), None)[0].text == "One, two"
    many = lines(tmp_path / "b.jsonl", [{"text": "x"}, {"page": "y"}, {"text": " "}])
    assert [entry.text for entry in texts_of(TABLES["pg19"], many, None)] == ["x", "y"]
    assert [entry.text for entry in texts_of(TABLES["pg19"], many, 1)] == ["x"]


def test_articles_from_files(tmp_path):
    ready = lines(tmp_path / "a.jsonl", [{"article": "A prompt", "summary_gt": "S"}] * 2)
    found = articles_of(TABLES["cnn"], ready, None, 5)
    assert [(entry.prompt, entry.summary) for entry in found] == [("A prompt", "S")] * 2
    rows = [{"document": f"D{i}", "summary": f"S{i}"} for i in range(3)]
    pairs = lines(tmp_path / "b.jsonl", rows)
    found = articles_of(TABLES["xsum"], pairs, None, 2)
    assert len(found) == 1
    assert found[0].prompt.count("###") == 3
    assert "in 1 sentence.\nS1\n" in found[0].prompt
    assert found[0].prompt.endswith("Article: D2\n\nSummarize the above article in 1 sentence.\n")
    assert len(articles_of(TABLES["xsum"], pairs, None, 0)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no lines"),
        ("{", "line 1: no valid JSON"),
        ("[1]", "line 1 is no object"),
        ('{"a": 1}', "has columns"),
        ('{"document": "a", "summary": "b"}', "no articles past 5 examples"),
    ],
)
def test_files_that_hold_no_articles_are_told(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        articles_of(TABLES["xsum"], str(path), None, None)
    with pytest.raises(FileNotFoundError, match="is no file"):
        articles_of(TABLES["xsum"], "nowhere.jsonl", None, None)
    with pytest.raises(ValueError, match=r"expected a \.jsonl"):
        articles_of(TABLES["xsum"], "a.txt", None, None)
