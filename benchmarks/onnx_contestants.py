"""One decode step of each exported model, with a context that was never computed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

import less_cache as lc
from exporters.onnx import OnnxDecoder, export_decoder
from exporters.onnx.state import OnnxState
from less_cache.state import EMPTY


class Exported:
    """An `OnnxDecoder` whose state is what `context` tokens would leave.

    A step takes as long whatever the numbers are, so the arrays are filled at random: a context of
    64k tokens then costs nothing to set up.
    """

    def __init__(self, folder: Path, context: int, batch: int, threads: int) -> None:
        self.decoder = OnnxDecoder(folder, ["CPUExecutionProvider"], threads=threads, verify=False)
        self.state = filled_state(self.decoder, context, batch)
        self.token = np.full((batch, 1), 7)

    @property
    def bytes_per_sequence(self) -> int:
        """Of the state."""
        return self.state.nbytes // self.state.batch_size

    def step(self) -> None:
        """One token of each sequence."""
        logits = self.decoder.append(self.state, self.token)
        self.token = logits.argmax(1)[:, None]


class GenAI:
    """onnxruntime-genai with what its own builder makes of the model: a growing full cache."""

    def __init__(self, folder: Path, context: int, batch: int, room: int) -> None:
        import onnxruntime_genai

        self.model = onnxruntime_genai.Model(str(folder))
        parameters = onnxruntime_genai.GeneratorParams(self.model)
        length = context + room
        parameters.set_search_options(
            max_length=length, min_length=length, batch_size=batch, do_sample=False
        )
        self.generator = onnxruntime_genai.Generator(self.model, parameters)
        prompt = np.random.default_rng(0).integers(5, 400, (batch, context), dtype=np.int32)
        self.generator.append_tokens(prompt)
        self.generator.generate_next_token()

    def step(self) -> None:
        """One token of each sequence; greedy, as the others."""
        self.generator.generate_next_token()


def filled_state(decoder: OnnxDecoder, context: int, batch: int) -> OnnxState:
    """A state as if each of `batch` sequences had seen `context` tokens."""
    rng = np.random.default_rng(0)
    state = decoder.new_state(batch)
    arrays: dict[str, np.ndarray] = {}
    for spec in decoder.manifest.state:
        shape = (batch, *spec.shape)
        kind = spec.name.rpartition(".")[2]
        if kind == "length":
            array = np.full(shape, context)
        elif kind == "positions":
            held = min(context, spec.shape[-1])
            row = np.full(spec.shape[-1], EMPTY)
            row[:held] = np.arange(context - held, context)
            array = np.broadcast_to(row, shape)
        else:
            array = rng.random(shape, dtype=np.float32)
        arrays[spec.name] = np.ascontiguousarray(array, dtype=spec.dtype)
    placed = {name: decoder.placement.put(array) for name, array in arrays.items()}
    return OnnxState(state.manifest, state.placement, placed)


def export_all(
    model: LlamaForCausalLM,
    folder: Path,
    *,
    capacity: int,
    policy: lc.Policy,
    rank: int,
    hidden: int,
    contexts: list[int],
    room: int,
) -> dict[Any, Path]:
    """Folders by name: ``"less"``, and the full cache by its context."""
    config = lc.CacheConfig.from_model(model.config, capacity=capacity, policy=policy, rank=rank)
    maps = lc.FeatureMaps.initialise(config, hidden=hidden)
    folders: dict[Any, Path] = {"less": export_decoder(model, config, maps, folder / "less")}
    for context in contexts:
        full = lc.CacheConfig.from_model(
            model.config, capacity=context + room, policy=lc.FullCache(), rank=0
        )
        folders[context] = export_decoder(model, full, None, folder / f"full-{context}")
    return folders


def build_genai(model: LlamaForCausalLM, tokenizer: Any, folder: Path, threads: int) -> Path | str:
    """What onnxruntime-genai's builder makes of the model, offline; or why it did not.

    Parameters
    ----------
    model, tokenizer
        To build from.
    folder
        Gets the model and what is built.
    threads
        Of a step.
    """
    source, out = folder / "source", folder / "genai"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(source), "-o", str(out), "-p", "fp32", "-e", "cpu"]
    command += ["-c", str(folder / "hub")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = out / "genai_config.json"
    if done.returncode or not path.is_file():
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    told = json.loads(path.read_text())
    options = told["model"]["decoder"]["session_options"]
    options["intra_op_num_threads"] = threads
    told["model"]["context_length"] = model.config.max_position_embeddings
    path.write_text(json.dumps(told))
    return out


def random_llama(positions: int, tiny: bool) -> LlamaForCausalLM:
    """A Llama of the shipped model's shapes with random weights, or a tiny one."""
    from transformers import LlamaConfig

    width, layers = (64, 2) if tiny else (256, 6)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()
