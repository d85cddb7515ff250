"""Build the wheel and the source distribution, and try each extra in an environment of its own.

    python tools/check_dist.py                  # all that a CPU can have; `make dist`
    python tools/check_dist.py onnx genai       # the build, the bare package and these extras

The wheel is built from the source distribution, so that this one is known to be complete. Extras
are installed over one environment that has the bare package alone: what an extra lacks is not there
by chance.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "dist"
OUT = ROOT / "dist"
MOST_BYTES = 20_000_000
"""Of the wheel; 14 MB of it are the shipped model and its maps."""

CALL = """
import torch, less_cache as lc
config = lc.CacheConfig(2, 4, 2, 16, capacity=8, policy=lc.H2O(), rank=2, hidden=8)
manager = lc.CacheManager(config, lc.FeatureMaps.initialise(config){backend})
state = manager.init(2)
q, k, v = torch.randn(2, 4, 30, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
assert manager.attend(state, 0, q, k, v).isfinite().all()
"""
BARE = (
    CALL.format(backend="")
    + """
import importlib.util, pathlib
assert pathlib.Path(lc.__file__).is_relative_to({base!r}), lc.__file__
assert importlib.util.find_spec("transformers") is None
from less_cache import reference_model
folder = reference_model.path().parent / "maps" / "h2o-5" / "end-to-end"
assert lc.FeatureMaps.from_pretrained(folder).rank == 8
assert (reference_model.path().parents[1] / "py.typed").exists()
"""
)
ATTACH = """
import less_cache as lc
from less_cache import reference_model
model, tokenizer = reference_model.load()
config = lc.CacheConfig.from_model(model.config, capacity=52, policy=lc.H2O(), rank=0)
with lc.attach(model, config):
    out = model.generate(**tokenizer("import os", return_tensors="pt"), max_new_tokens=70)
assert out.shape[1] > 52
"""
DECODE = """
from exporters.onnx import OnnxDecoder
decoder = OnnxDecoder("onnx"{arguments})
assert len(decoder.generate([[5, 6, 7]], max_new_tokens=8)[0]) == 8
"""
GENAI = """
import onnxruntime_genai as og
model = og.Model("genai")
generator = og.Generator(model, og.GeneratorParams(model))
generator.append_tokens([5, 6, 7])
generator.generate_next_token()
"""
OPENVINO = """
import numpy as np, openvino as ov
model = ov.Core().compile_model("onnx/model.onnx", "CPU")
given = {}
for port in model.inputs:
    shape = [1 if size.is_dynamic else size.get_length() for size in port.partial_shape]
    fill = -1 if port.any_name.endswith("positions") else 1 if "past" not in port.any_name else 0
    given[port.any_name] = np.full(shape, fill, port.element_type.to_dtype())
assert np.isfinite(model(given)["logits"]).all()
"""
SUMMARY = "\n".join(
    json.dumps({"document": f"It rained on day {n}. " * 9, "summary": "Rain."}) for n in range(4)
)

COMMAND = "less-cache "
EXPORT = COMMAND + "export onnx --capacity 52 --out onnx"
TRAIN = """
--data text.py --out run --recipe fast --epochs 1 --layers 0
--length 128 --sequences 4 --capacity 16
"""
LM_EVAL = """
--model less-cache --model_args pretrained=reference,capacity=52 --device cpu --limit 2
--tasks less_cache_choices --include_path tests/integrations/lm_eval_tasks
"""
REPRODUCE = """
--table xsum --data articles.jsonl --out table --share 5% --policy h2o
--shots 1 --limit 1 --new-tokens 4
"""
EXTRAS = {
    "transformers": [ATTACH],
    "triton": [CALL.format(backend=", backend='triton'")],
    "train": [f"{COMMAND} train {TRAIN}"],
    "onnx": [EXPORT, DECODE.format(arguments="")],
    "onnx-gpu": [EXPORT, DECODE.format(arguments=", ['CPUExecutionProvider']")],
    "genai": [COMMAND + "export onnx --format genai --capacity 52 --out genai", GENAI],
    "openvino": [EXPORT + " --inline", OPENVINO],
    "serve": ["import fastapi, onnxruntime, prometheus_client, uvicorn"],
    "lm-eval": [f"{COMMAND} lm-eval run {LM_EVAL}"],
    "paper": [f"{COMMAND} reproduce {REPRODUCE}"],
    "docs": ["import mkdocs, material, mkdocstrings_handlers.python"],
}
"""What is done with each: commands of ours, and Python."""
NEEDED_TOO = {"genai": ["onnx"]}
"""Extras that another one is of use with alone."""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command; where it fails, show what it said and stop."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(done.stdout)
        sys.exit(f"failed: {' '.join(map(str, command))[:300]}")


def environment(name: str, base: Path | None = None) -> Path:
    """A new environment's folder of programs; what `base` has is there as well."""
    folder = WORK / name
    venv.create(folder, clear=True, with_pip=True)
    if base is not None:
        packages(folder).joinpath("base.pth").write_text(f"{packages(base)}\n", encoding="utf-8")
    return folder / ("Scripts" if os.name == "nt" else "bin")


def packages(folder: Path) -> Path:
    """Where the environment in a folder has its packages."""
    (found,) = folder.glob("[Ll]ib/**/site-packages")
    return found


def install(programs: Path, *what: str) -> None:
    """Install packages, with the versions that the project is developed with."""
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--constraint", ROOT / "constraints.txt", *what)


def build() -> Path:
    """The wheel, built from the source distribution."""
    programs = environment("build")
    install(programs, "build")
    for old in OUT.glob("less_cache-*"):
        old.unlink()
    run(programs / "python", "-m", "build", "--outdir", OUT, ROOT)
    (wheel,) = OUT.glob("*.whl")
    (source,) = OUT.glob("*.tar.gz")
    check_contents(wheel, source)
    return wheel


def check_contents(wheel: Path, source: Path) -> None:
    """Refuse a wheel of the wrong size or content, and a source distribution that lacks a file."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    top = {name.partition("/")[0] for name in inside}
    info = wheel.name.partition("-py3")[0] + ".dist-info"
    problems = [f"in the wheel: {name}" for name in sorted(top - {"less_cache", "exporters", info})]
    if not any(name.startswith(info) and name.endswith("LICENSE") for name in inside):
        problems.append("not in the wheel: LICENSE")
    if wheel.stat().st_size > MOST_BYTES:
        problems.append(f"the wheel has {wheel.stat().st_size:,} bytes, at most {MOST_BYTES:,}")
    ours = [name for part in ("less_cache", "exporters") for name in tracked(part)]
    problems += [f"not in the wheel: {name}" for name in ours if name not in inside]
    problems += [f"in the wheel: {name}" for name in inside - set(ours) if info not in name]
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    lacking = [name for name in tracked() if name not in held]
    problems += [f"not in the source distribution: {name}" for name in lacking]
    if problems:
        sys.exit("\n".join(problems))
    sizes = " and ".join(f"{file.name} of {file.stat().st_size:,}" for file in (wheel, source))
    print(f"built: {sizes} bytes")


def tracked(*folders: str) -> list[str]:
    """The repository's files."""
    listing = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return listing.stdout.splitlines()


def try_bare(wheel: Path) -> Path:
    """The environment that has the package without extras, tried."""
    programs = environment("bare")
    base = programs.parent
    install(programs, str(wheel))
    work(programs, "bare", [BARE.format(base=str(base)), COMMAND + "info"])
    run(programs / "less-cache", "--version")
    return base


def try_extra(wheel: Path, base: Path, extra: str) -> None:
    """Install an extra over the bare package, and use it."""
    programs = environment(extra, base)
    names = ",".join([extra, *NEEDED_TOO.get(extra, [])])
    install(programs, f"less_cache[{names}] @ {wheel.as_uri()}")
    work(programs, extra, EXTRAS[extra])


def work(programs: Path, name: str, steps: list[str]) -> None:
    """Do what a user of an environment would, in a folder that has no source of ours."""
    folder = WORK / f"work-{name}"
    tasks = folder / "tests" / "integrations" / "lm_eval_tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    for source in (ROOT / tasks.relative_to(folder)).iterdir():
        (tasks / source.name).write_bytes(source.read_bytes())
    (folder / "text.py").write_bytes((ROOT / "less_cache" / "ops.py").read_bytes())
    (folder / "articles.jsonl").write_text(SUMMARY, encoding="utf-8")
    for step in steps:
        ours = ("-m", "less_cache.cli", *shlex.split(step)[1:])
        words = ours if step.startswith(COMMAND) else ("-c", step)
        run(programs / "python", *words, cwd=folder)
    print(f"works: {name}", flush=True)


def main() -> None:
    """Build, and try what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("extras", nargs="*", help=f"of {', '.join(EXTRAS)}; default: all")
    extras = parser.parse_args().extras or [*EXTRAS]
    if unknown := sorted(set(extras) - set(EXTRAS)):
        parser.error(f"extras: got {unknown[0]!r}, expected some of {', '.join(EXTRAS)}")
    wheel = build()
    base = try_bare(wheel)
    for extra in extras:
        try_extra(wheel, base, extra)


if __name__ == "__main__":
    main()
