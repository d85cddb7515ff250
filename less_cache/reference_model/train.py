"""Train the reference model: `python -m less_cache.reference_model.train --out DIR`.

Everything random comes from generators seeded by (seed, purpose, epoch), so a run that was
stopped and started again with the same command ends in the same weights, bit for bit, on the same
kind of CPU with as many threads.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from less_cache.reference_model import data
from less_cache.reference_model.architecture import Settings, build_model
from less_cache.reference_model.tokenizer import train_tokenizer
from less_cache.reference_model.windows import Windows, token_streams

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def window_losses(model: "LlamaForCausalLM", windows: torch.Tensor) -> torch.Tensor:
    """Return each token's loss, `[windows, context]`, under bfloat16 autocast.

    Parameters
    ----------
    model : LlamaForCausalLM
        The model.
    windows : Tensor
        Token numbers, `[windows, context + 1]`.
    """
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    losses = cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.view(windows.shape[0], -1)


def _optimizers(model: "LlamaForCausalLM", settings: Settings) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=settings.matrix_rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=settings.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Run:
    """One training run: its state, and what is written of it to a folder.

    Parameters
    ----------
    settings : Settings
        What determines the result.
    training, held_out : sequence of Document
        The text; of each held-out document one window is judged as training goes on.
    out : Path
        Folder of checkpoint, tokenizer and log. A checkpoint found there is resumed.
    compiled : bool
        Whether to compile the loss, which is worth it for more than some minutes of training.
    """

    def __init__(
        self,
        settings: Settings,
        training: Sequence[data.Document],
        held_out: Sequence[data.Document],
        out: Path,
        compiled: bool = True,
    ) -> None:
        self.settings, self.out = settings, out
        out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = self._tokenizer(training)
        self.model = build_model(settings, len(self.tokenizer))
        self.optimizers = _optimizers(self.model, settings)
        streams = token_streams(training, self.tokenizer, settings.context)
        self.windows = Windows(streams, settings.context, settings.seed)
        judged = token_streams(held_out, self.tokenizer, settings.context)
        starts = [(len(s) - settings.context - 1) // 2 for s in judged]
        self.held_out = torch.stack(
            [s[a : a + settings.context + 1] for s, a in zip(judged, starts, strict=True)]
        )
        self.losses: Callable[..., torch.Tensor] = window_losses
        if compiled:
            self.losses = torch.compile(window_losses)
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self._recent: list[float] = []
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's file."""
        return self.out / "checkpoint.pt"

    def _tokenizer(self, training: Sequence[data.Document]) -> "PreTrainedTokenizerFast":
        from transformers import PreTrainedTokenizerFast

        folder = self.out / "tokenizer"
        if not folder.exists():
            partial = self.out / "tokenizer.partial"
            train_tokenizer(training).save_pretrained(partial)
            partial.rename(folder)
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
        return tokenizer

    def save(self) -> None:
        """Write the checkpoint, replacing the previous one in a single rename."""
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "recent": self._recent,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        before, now = Settings(**state["settings"]), self.settings
        fixed = {k: v for k, v in asdict(before).items() if k != "steps"}
        falling = state["step"] > min(before.decay_start, now.decay_start)
        if {**fixed, "steps": now.steps} != asdict(now) or (before != now and falling):
            raise ValueError(f"{self.checkpoint} belongs to a run with other settings: {before}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        self._recent = state["recent"]

    def train_step(self) -> float:
        """Take one optimiser step and return its loss."""
        settings, total = self.settings, 0.0
        rate = settings.rate(self.step)
        windows = self.windows.batch(self.step, settings.batch)
        for at in range(0, settings.batch, settings.micro_batch):
            part = windows[at : at + settings.micro_batch]
            loss = self.losses(self.model, part).sum() / windows[:, 1:].numel()
            torch.autograd.backward(loss)
            total += loss.item()
        peaks = (settings.matrix_rate, settings.other_rate)
        for optimizer, peak in zip(self.optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    @torch.no_grad()
    def judge(self) -> tuple[float, float]:
        """Return the held-out loss over all positions and over the second half of the context."""
        size = self.settings.micro_batch
        parts = [self.held_out[at : at + size] for at in range(0, len(self.held_out), size)]
        losses = torch.cat([window_losses(self.model, part) for part in parts])
        return losses.mean().item(), losses[:, losses.shape[1] // 2 :].mean().item()

    def train(self, save_every: int, judge_every: int, publish: Path | None = None) -> None:
        """Train to the end, writing checkpoints, log and model on the way.

        Parameters
        ----------
        save_every, judge_every : int
            Steps between checkpoints, and between held-out losses.
        publish : Path, optional
            Where else to put the model whenever it is judged, and at the end.
        """
        from tqdm import tqdm

        bar = tqdm(total=self.settings.steps, initial=self.step, unit="step", mininterval=10)
        while self.step < self.settings.steps:
            began = time.monotonic()
            self._recent.append(self.train_step())
            self.seconds += time.monotonic() - began
            bar.update()
            bar.set_postfix(loss=f"{self._recent[-1]:.3f}", refresh=False)
            last = self.step == self.settings.steps
            if last or self.step % judge_every == 0:
                everywhere, second_half = self.judge()
                entry = {
                    "step": self.step,
                    "train": round(sum(self._recent) / len(self._recent), 4),
                    "held_out": round(everywhere, 4),
                    "held_out_second_half": round(second_half, 4),
                }
                self._recent.clear()
                self.curve.append(entry)
                with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps({**entry, "seconds": round(self.seconds, 1)}) + "\n")
                if not last:
                    self._export_all(publish)
            if last or self.step % save_every == 0:
                self.save()
        bar.close()
        self._export_all(publish)

    def _export_all(self, publish: Path | None) -> None:
        for folder in filter(None, (self.out / "model", publish)):
            self.export(folder)

    def record(self) -> dict[str, Any]:
        """Return what the shipped model's record says of the run."""
        import tokenizers
        import transformers

        tokens = self.step * self.settings.batch * self.settings.context
        return {
            "settings": asdict(self.settings),
            "steps_done": self.step,
            "tokens_seen": tokens,
            "tokens_per_second": round(tokens / max(self.seconds, 1e-9)),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "data_manifest_sha256": _file_hash(data.MANIFEST),
            "machine": f"{os.cpu_count()}-core {platform.machine()} CPU, "
            f"{torch.get_num_threads()} thread, bf16 autocast",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
            "loss_curve": self.curve,
        }

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face layout, file by file, each in a single rename.

        Parameters
        ----------
        folder : Path
            Where to; made if it is not there.
        """
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        folder.mkdir(exist_ok=True)
        copy = build_model(self.settings, len(self.tokenizer)).bfloat16()
        copy.load_state_dict(self.model.state_dict())
        # Not in the model's own configuration, where it would stop the end token's training.
        copy.generation_config.pad_token_id = self.tokenizer.pad_token_id
        copy.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        files = {file.name: _file_hash(file) for file in sorted(partial.iterdir())}
        record = {**self.record(), "files_sha256": files}
        text = json.dumps(record, indent=1) + "\n"
        (partial / "training_record.json").write_text(text, encoding="utf-8")
        for file in partial.iterdir():
            file.chmod(0o644)
            file.replace(folder / file.name)
        partial.rmdir()


def _file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train from the command line; the same command resumes a run that was stopped."""
    parser = argparse.ArgumentParser(description="Train the reference model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and log")
    parser.add_argument("--publish", type=Path, help="another folder for the model")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=75, help="steps between checkpoints")
    parser.add_argument("--judge-every", type=int, default=150, help="steps between judgements")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    run = Run(
        Settings(steps=options.steps, seed=options.seed),
        data.training_documents(),
        data.held_out_documents(),
        options.out,
        compiled=not options.no_compile,
    )
    run.train(options.save_every, options.judge_every, options.publish)
    return 0


if __name__ == "__main__":
    sys.exit(main())
