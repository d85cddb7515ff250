"""Training: reproducible windows, and a run that resumes to the same bits."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from less_cache.reference_model import Document, held_out_documents
from less_cache.reference_model.architecture import Settings
from less_cache.reference_model.tokenizer import train_tokenizer
from less_cache.reference_model.train import Run, main
from less_cache.reference_model.windows import Windows, token_streams

TINY = Settings(
    steps=3,
    context=32,
    batch=4,
    micro_batch=2,
    hidden=32,
    intermediate=48,
    layers=2,
    heads=2,
    warmup=1,
)


@pytest.fixture(scope="module")
def documents():
    return [Document(d.name, d.text[:6000]) for d in held_out_documents()[:6]]


@pytest.fixture(scope="module")
def trained_before(documents, tmp_path_factory):
    """A folder with a small tokenizer, so that no run has to train its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(documents, vocabulary=300).save_pretrained(folder)
    return folder


@pytest.fixture
def start(documents, trained_before, tmp_path):
    def start(name, settings=TINY):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        if not (out / "tokenizer").exists():
            (out / "tokenizer").symlink_to(trained_before)
        return Run(settings, documents[:4], documents[4:], out, compiled=False)

    return start


def assert_same_weights(one, other):
    for (name, a), (_, b) in zip(
        one.model.state_dict().items(), other.model.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "text", ["", "def f(x):\n\treturn x\r\n", "naïve — 数 🎉", "\x00\x7f  \n\n"]
)
def test_tokenizer_round_trip(documents, text):
    tokenizer = train_tokenizer(documents, vocabulary=300)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300
    assert tokenizer.eos_token_id == 0


def test_resumed_run_equals_uninterrupted_run(start, monkeypatch):
    whole = start("whole")
    whole.train(save_every=10, judge_every=10)

    def stop(run):
        raise KeyboardInterrupt

    first = start("parts")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "judge", stop)
        with pytest.raises(KeyboardInterrupt):
            first.train(save_every=2, judge_every=10)
    second = start("parts")
    assert second.step == 2
    second.train(save_every=10, judge_every=10)

    assert_same_weights(whole, second)
    assert whole.curve == second.curve


def test_finished_run_is_only_published_again(start, tmp_path):
    whole = start("whole")
    whole.train(save_every=10, judge_every=10)
    again = start("whole")
    again.train(save_every=10, judge_every=10, publish=tmp_path / "published")
    assert_same_weights(whole, again)
    for file in (whole.out / "model").iterdir():
        assert (tmp_path / "published" / file.name).read_bytes() == file.read_bytes()


def test_seed_changes_weights(start):
    one, other = start("one"), start("other", replace(TINY, seed=1))
    assert not torch.equal(one.model.lm_head.weight, other.model.lm_head.weight)
    assert not torch.equal(one.windows.batch(0, 4), other.windows.batch(0, 4))


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch": 8}, {"steps": 4}])
def test_checkpoint_of_another_run_is_refused(start, change):
    run = start("run")
    for _ in range(3):
        run.train_step()
    run.save()
    with pytest.raises(ValueError, match="other settings"):
        start("run", replace(TINY, **change))


def test_steps_may_change_before_the_rate_falls(start):
    run = start("run")
    run.train_step()
    run.save()
    assert start("run", replace(TINY, steps=4)).step == 1


def test_training_lowers_the_loss_and_writes_model_and_log(start, tmp_path):
    run = start("run", replace(TINY, steps=40))
    before, _ = run.judge()
    run.train(save_every=20, judge_every=20, publish=tmp_path / "published")
    assert run.judge()[0] < before - 0.3
    entries = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [20, 40]
    for folder in (run.out / "model", tmp_path / "published"):
        record = json.loads((folder / "training_record.json").read_text())
        assert record["steps_done"] == 40
        assert record["tokens_seen"] == 40 * TINY.batch * TINY.context
        assert {file.name for file in folder.iterdir()} == {
            *record["files_sha256"],
            "training_record.json",
        }


def test_rate_rises_holds_and_falls():
    settings = Settings(steps=100, warmup=10, decay=0.5)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[9:51]) == {1.0}
    assert rates[99] == pytest.approx(0.02)
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_windows_cover_each_epoch_without_overlap():
    streams = [torch.arange(0, 1000), torch.arange(2000, 2100)]
    windows = Windows(streams, context=32, seed=0)
    epoch = windows.batch(0, windows.count)
    assert epoch.shape == (windows.count, 33)
    inputs = epoch[:, :-1].flatten()
    assert len(set(inputs.tolist())) == inputs.numel()
    assert torch.equal(epoch, Windows(streams, context=32, seed=0).batch(0, windows.count))
    assert not torch.equal(epoch, windows.batch(1, windows.count))
    assert torch.equal(windows.batch(3, 2), windows.batch(3, 2))


def test_short_documents_share_a_stream(documents):
    tokenizer = train_tokenizer(documents, vocabulary=300)
    short = [Document(str(i), "x = 1\n" * 5) for i in range(20)]
    streams = token_streams([*documents[:2], *short], tokenizer, context=64)
    assert len(streams) == 3
    assert (streams[2] == tokenizer.eos_token_id).sum() == 20


def test_command_line_needs_a_folder(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--out" in capsys.readouterr().err
