"""The artefact: it loads, it learned something, and a small cache costs it something."""

import hashlib
import json
import math
from collections import Counter

import pytest
import torch

pytest.importorskip("transformers")

from less_cache import reference_model

CONTEXT, SINKS, SLOTS = 1024, 4, 52
SIZE_LIMIT = 14_000_000


@pytest.fixture(scope="module")
def loaded():
    return reference_model.load()


@pytest.fixture(scope="module")
def record():
    return json.loads((reference_model.path() / "training_record.json").read_text())


@pytest.fixture(scope="module")
def windows(loaded):
    _, tokenizer = loaded
    rows = []
    for document in reference_model.held_out_documents()[::5]:
        ids = tokenizer(document.text)["input_ids"]
        start = (len(ids) - CONTEXT - 1) // 2
        rows.append(ids[start : start + CONTEXT + 1])
    return torch.tensor(rows)


@torch.no_grad()
def token_losses(model, windows, allowed):
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    losses = []
    for window in windows:
        logits = model(
            input_ids=window[None, :-1], attention_mask=mask[None, None], use_cache=False
        ).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0], window[1:], reduction="none"))
    return torch.stack(losses)


def test_files_match_the_record(record):
    folder = reference_model.path()
    assert {f.name for f in folder.iterdir()} == {*record["files_sha256"], "training_record.json"}
    for name, digest in record["files_sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert (folder / "model.safetensors").stat().st_size < SIZE_LIMIT


def test_record_names_the_data_and_a_finished_run(record):
    manifest = reference_model.data.MANIFEST.read_bytes()
    assert record["data_manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert record["steps_done"] == record["settings"]["steps"]
    assert record["loss_curve"][-1]["step"] == record["steps_done"]


def test_architecture(loaded, record):
    model, tokenizer = loaded
    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (6, 4, 64)
    assert config.max_position_embeddings == CONTEXT
    assert len(tokenizer) == config.vocab_size == 4096
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert model.dtype is torch.float32


def test_tokenizer_round_trip(loaded):
    _, tokenizer = loaded
    text = reference_model.held_out_documents()[0].text[:20_000] + "naïve — 数 🎉\t\r\n \x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_beats_unigrams_and_needs_its_cache(loaded, windows):
    model, tokenizer = loaded
    rows = torch.arange(CONTEXT)[:, None]
    columns = torch.arange(CONTEXT)
    causal = columns <= rows
    kept = causal & ((columns < SINKS) | (columns > rows - (SLOTS - SINKS)))
    full, small = (token_losses(model, windows, mask) for mask in (causal, kept))

    counts = Counter(windows.flatten().tolist())
    total = sum(counts.values())
    unigram = -sum(n / total * math.log(n / total) for n in counts.values())
    assert full.mean() < unigram / 1.5 < math.log(len(tokenizer))

    second_half = slice(CONTEXT // 2, None)
    lost = (small[:, second_half].mean() - full[:, second_half].mean()).exp()
    assert lost > 1.25
    assert full[:, second_half].mean() < full[:, : CONTEXT // 4].mean()


def test_loads_in_another_dtype_and_generates():
    model, tokenizer = reference_model.load(dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    inputs = tokenizer("import os\nimport ", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert output.shape == (1, inputs["input_ids"].shape[1] + 8)
