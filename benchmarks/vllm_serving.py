"""vLLM with the full cache and with LESS: requests held, and tokens a second end to end.

::

    OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.vllm_serving
    OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.vllm_serving --client

Both answer the same random prompts from the same memory, one after the other in one run: as an
engine in this process, where the processor's time can be told as well, which other work on the
machine changes little; or with ``--client`` as servers, asked by ``vllm bench serve``. The
model is the reference model, with more positions where prompts are longer: this measures time, not
text. LESS keeps the slots of 5 % of 1,024 tokens, whatever the prompt's length; ``--cache`` names
others.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measuring import surroundings
from less_cache.reference_model import path as reference_path
from less_cache.reference_model import tuned
from less_cache.reference_model.shipped_maps import END_TO_END, FOLDER

BIN = Path(sys.executable).parent
RESULTS = Path(__file__).parent / "results"
SLOTS = 52
CACHES: dict[str, dict[str, Any] | None] = {
    "full": None,
    "less": {
        "capacity": SLOTS,
        "policy": "sinkwindow:sinks=4",
        "maps": str(FOLDER / "sinkwindow-5" / END_TO_END),
    },
    "less, H2O": {
        "capacity": SLOTS,
        "policy": "h2o",
        "maps": str(FOLDER / "h2o-5" / END_TO_END),
    },
    "window": {"capacity": SLOTS, "policy": "sinkwindow:sinks=4"},
    "tuned": {"cache": str(tuned("5%"))},
}
COMPARED = ("full", "less")


@dataclass(frozen=True)
class Load:
    """Requests that all come at once.

    Attributes
    ----------
    requests, prompt, answer : int
        How many, and tokens of each.
    longest : int
        The model's positions.
    chunk : int
        `prompt_chunk` of LESS.
    """

    requests: int
    prompt: int
    answer: int
    longest: int
    chunk: int


LOADS = {"short": Load(64, 832, 64, 1024, 256), "long": Load(16, 8000, 90, 8192, 256)}


def model_folder(parent: Path, longest: int) -> Path:
    """The reference model, with so many positions."""
    folder = parent / f"model-{longest}"
    folder.mkdir(exist_ok=True)
    for file in reference_path().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = longest
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = longest
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@contextmanager
def serve(
    model: Path, load: Load, memory: int, less: dict[str, Any] | None, log: Path
) -> Iterator[str]:
    """The address of a server that is ready."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [BIN / "vllm", "serve", model, "--port", port, "--host", "127.0.0.1"]
    words += ["--served-model-name", "reference", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", load.longest, "--max-num-seqs", load.requests]
    words += ["--max-num-batched-tokens", 2048, "--kv-cache-memory-bytes", memory]
    words += ["--no-enable-prefix-caching"]
    if less is not None:
        given = json.dumps({"less_cache": less})
        words += ["--attention-backend", "CUSTOM", "--additional-config", given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as told:
        process = subprocess.Popen(
            list(map(str, words)), stdout=told, stderr=subprocess.STDOUT, env=environment
        )
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(400):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text()[-3000:])
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def held(log: Path) -> float | None:
    """How many requests of the longest kind fit, as vLLM tells it; `None`: its log is silent."""
    told = r"Maximum concurrency for [\d,]+ tokens per request: ([\d.,]+)x"
    found = re.search(told, log.read_text())
    return float(found[1].replace(",", "")) if found else None


def measure(address: str, model: Path, load: Load, seed: int, folder: Path) -> dict[str, float]:
    """What vLLM's client measures of one burst."""
    words = [BIN / "vllm", "bench", "serve", "--base-url", address, "--model", "reference"]
    words += ["--tokenizer", model, "--dataset-name", "random", "--request-rate", "inf"]
    words += ["--random-input-len", load.prompt, "--random-output-len", load.answer]
    words += ["--num-prompts", load.requests, "--ignore-eos", "--seed", seed]
    words += ["--save-result", "--result-dir", folder, "--result-filename", "burst.json"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = json.loads((folder / "burst.json").read_text())
    if found["completed"] != load.requests:
        raise RuntimeError(f"{found['completed']} of {load.requests} requests were answered")
    return {
        "seconds": found["duration"],
        "tokens_a_second": found["total_token_throughput"],
        "first_token_ms": found["mean_ttft_ms"],
        "token_ms": found["mean_tpot_ms"],
    }


def as_servers(
    model: Path, load: Load, memory: int, less: dict[str, Any] | None, bursts: int, folder: Path
) -> dict[str, Any]:
    """What vLLM's client finds."""
    log = folder / "log"
    with serve(model, load, memory, less, log) as address:
        # A small burst warms up.
        measure(address, model, replace(load, requests=2), 0, folder)
        timed = [measure(address, model, load, i + 1, folder) for i in range(bursts)]
    best = min(timed, key=lambda burst: burst["seconds"])
    return {"requests_held": held(log), **best, "bursts": timed}


def in_this_process(
    model: Path, load: Load, memory: int, less: dict[str, Any] | None, bursts: int, folder: Path
) -> dict[str, Any]:
    """What an engine does with all requests handed in at once."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": load.longest,
        "max_num_seqs": load.requests,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": memory,
        "enable_prefix_caching": False,
    }
    if less is not None:
        options["attention_backend"] = "CUSTOM"
        options["additional_config"] = {"less_cache": less}
    llm = LLM(**options)
    cache = llm.llm_engine.vllm_config.cache_config
    # Block 0 belongs to nobody.
    pages = cache.num_gpu_blocks - 1
    holds = pages if less is not None else pages * cache.block_size / load.longest
    timed = []
    for burst in range(-1, bursts):
        some = load if burst >= 0 else replace(load, requests=2, prompt=300, answer=4)
        draws = random.Random(burst)
        prompts = [
            {"prompt_token_ids": draws.choices(range(5, 4000), k=some.prompt)}
            for _ in range(some.requests)
        ]
        parameters = SamplingParams(
            max_tokens=some.answer, temperature=0, ignore_eos=True, detokenize=False
        )
        started, processor = time.perf_counter(), time.process_time()
        llm.generate(prompts, parameters, use_tqdm=False)
        if burst >= 0:
            seconds = time.perf_counter() - started
            tokens = some.requests * (some.prompt + some.answer)
            timed.append(
                {
                    "seconds": seconds,
                    "processor_seconds": time.process_time() - processor,
                    "tokens_a_second": tokens / seconds,
                }
            )
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    best = min(timed, key=lambda burst: burst["processor_seconds"])
    return {"requests_held": holds, **best, "bursts": timed}


def run(name: str, load: Load, given: argparse.Namespace) -> dict[str, Any]:
    """The caches under one load."""
    found: dict[str, Any] = {"load": asdict(load), "memory_bytes": given.memory}
    way = as_servers if given.client else in_this_process
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = model_folder(folder, load.longest)
        for cache in given.cache or COMPARED:
            less = CACHES[cache]
            if less is not None:
                less = {**less, "prompt_chunk": load.chunk}
            found[cache] = way(model, load, given.memory, less, given.bursts, folder)
            for kind in ("seconds", "processor_seconds"):
                if less is not None and kind in found.get("full", {}):
                    found[cache][f"{kind}_ratio"] = found["full"][kind] / found[cache][kind]
            told = {key: value for key, value in found[cache].items() if key != "bursts"}
            print(name, cache, json.dumps(told), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--load", action="append", choices=LOADS, help="default: both")
    parser.add_argument("--memory", type=int, default=2**30, help="bytes of the pool")
    parser.add_argument("--cache", action="append", choices=CACHES, help="default: full and less")
    parser.add_argument("--chunk", type=int, help="prompt_chunk of LESS; default: the load's")
    parser.add_argument("--bursts", type=int, default=1)
    parser.add_argument("--client", action="store_true", help="servers, and vLLM's own client")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_serving.json")
    given = parser.parse_args()
    loads = given.load or list(LOADS)
    if not given.client:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    facts = {**surroundings(), "vllm": version("vllm")}
    way = "client" if given.client else "in_process"
    written = json.loads(given.out.read_text()) if given.out.exists() else {}
    found = {name: run(name, _with_chunk(LOADS[name], given.chunk), given) for name in loads}
    # Both ways stand in one file.
    given.out.write_text(
        json.dumps({**written, way: {**facts, "loads": found}}, indent=2, sort_keys=True) + "\n"
    )


def _with_chunk(load: Load, chunk: int | None) -> Load:
    return load if chunk is None else replace(load, chunk=chunk)


if __name__ == "__main__":
    main()
