"""The text: what is held out is nowhere in training, and another library is refused."""

import json

import pytest

from less_cache.reference_model import data, held_out_documents, training_documents

RUN_OF_LINES = 12


@pytest.fixture(scope="module")
def manifest():
    return json.loads(data.MANIFEST.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def training_texts():
    try:
        return data.training_files()
    except RuntimeError as error:
        pytest.skip(str(error))


def line_runs(text):
    """Return every run of consecutive lines, blank and trivial ones left out."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if len(line) > 3]
    return {
        hash(tuple(lines[at : at + RUN_OF_LINES])) for at in range(len(lines) - RUN_OF_LINES + 1)
    }


def test_held_out_documents_are_many_and_long():
    documents = held_out_documents()
    assert len(documents) >= 25
    sizes = [len(d.text.encode()) for d in documents]
    assert min(sizes) >= data.DOCUMENT_MIN_BYTES
    assert sum(sizes) < 1_500_000


def test_the_two_sets_share_no_file_and_no_digest(manifest):
    training, held_out = manifest["training"], manifest["held_out"]
    assert not training.keys() & held_out.keys()
    assert not set(training.values()) & set(held_out.values())
    assert all(data.is_held_out(file) for file in held_out)
    assert not any(data.is_held_out(file) for file in training)


@pytest.mark.parametrize("module", data.HELD_OUT_MODULES)
def test_neither_a_held_out_module_nor_its_tests_are_trained_on(manifest, module):
    own = (f"{module}.py", f"{module}/", f"test/test_{module}.py", f"test/test_{module}/")
    assert not [file for file in manifest["training"] if file.startswith(own)]


def test_no_long_run_of_held_out_lines_is_trained_on(training_texts):
    held_out = set().union(*(line_runs(d.text) for d in held_out_documents()))
    assert len(held_out) > 10_000
    leaks = [file for file, text in training_texts.items() if line_runs(text) & held_out]
    assert not leaks


def test_training_documents_hold_each_file_once(training_texts):
    documents = training_documents()
    assert len({d.name for d in documents}) == len(documents)
    assert sum(len(d.text) for d in documents) >= sum(map(len, training_texts.values()))
    by_name = {d.name: d.text for d in documents}
    assert training_texts["asyncio/events.py"] in by_name["asyncio"]
    assert training_texts["test/test_asyncio/test_events.py"] in by_name["asyncio"]


def test_another_library_is_refused(monkeypatch, tmp_path):
    (tmp_path / "os.py").write_text("x = 1\n")
    monkeypatch.setattr(data, "standard_library", lambda: tmp_path)
    with pytest.raises(RuntimeError, match=r"CPython 3\.11\.7.*missing"):
        data.training_files()


def test_a_changed_held_out_document_is_refused(monkeypatch, tmp_path, manifest):
    for file in manifest["held_out"]:
        (tmp_path / f"{file.replace('/', '.')}.txt").write_text("changed\n")
    monkeypatch.setattr(data, "HELD_OUT_FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=r"argparse\.py\.txt"):
        held_out_documents()


def test_unusable_files_are_left_out(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "table.py").write_text("decoding_table = (\n    'a'\n)\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("x = 1\n")
    assert [file for file, _ in data.library_files(tmp_path)] == ["good.py"]
