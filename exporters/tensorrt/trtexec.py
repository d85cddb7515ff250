"""The lines that build the same engines with NVIDIA's own tools.

    python -m exporters.tensorrt.trtexec EXPORTED [--plugin LIBRARY [--no-alias]] [--out ENGINES]
        [--polygraphy]

writes the two graphs beside the exported file and prints, for each, what to run.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from exporters.common.manifest import read_manifest

from .files import PROMPT_ENGINE, STEP_ENGINE
from .graphs import derive_graphs
from .limits import Limits, Shape, check_limits, input_shapes

PREVIEW = {
    "trtexec": ["--preview=+aliasedPluginIO1003"],
    "polygraphy": ["--preview-features", "ALIASED_PLUGIN_IO_10_03"],
}
"""Says that the plugin updates the state in place."""

PLUGIN_WORDS: dict[str, Callable[[str], list[str]]] = {
    "trtexec": lambda library: [f"--dynamicPlugins={library}"],
    "polygraphy": lambda library: ["--plugins", library],
}
"""Load the plugin's library."""


def command_lines(
    onnx_dir: str | Path,
    out_dir: str | Path,
    limits: Limits | None = None,
    *,
    plugin: str | Path | None = None,
    alias: bool = True,
    tool: str = "trtexec",
) -> list[str]:
    """What to run for the step's engine and for the prompt's.

    Parameters
    ----------
    onnx_dir
        What `exporters.onnx.export_decoder` wrote; the graphs are written there, too.
    out_dir
        Where to put the engines.
    limits
        From `check_limits`. Default: one sequence, prompts of 512 tokens.
    plugin
        The plugin's library; without it the step is in standard operators.
    alias
        As `build_engines` has it.
    tool
        ``"trtexec"`` or ``"polygraphy"``.

    Raises
    ------
    FileNotFoundError, ValueError
        See `derive_graphs`.
    """
    if tool not in PREVIEW:
        raise ValueError(f"tool: got {tool!r}, expected one of {list(PREVIEW)}")
    manifest = read_manifest(onnx_dir, verify=False)
    limits = limits or check_limits(manifest, 1, 512)
    graphs = derive_graphs(onnx_dir, plugin=plugin is not None, verify=False)
    exact = manifest.config.dtype == "float32"
    write = _trtexec if tool == "trtexec" else _polygraphy
    lines = []
    for graph, name in zip(graphs, (STEP_ENGINE, PROMPT_ENGINE), strict=True):
        step = name == STEP_ENGINE
        shapes = input_shapes(manifest, limits, step=step)
        library = str(plugin) if step and plugin is not None else None
        words = write(graph, Path(out_dir) / name, shapes, exact)
        if library is not None:
            words += PLUGIN_WORDS[tool](library)
            words += PREVIEW[tool] if alias else []
        lines.append(shlex.join(words))
    return lines


def _trtexec(
    graph: Path,
    engine: Path,
    shapes: Mapping[str, tuple[Shape, Shape, Shape]],
    exact: bool,
) -> list[str]:
    words = ["trtexec", f"--onnx={graph}", f"--saveEngine={engine}", "--skipInference"]
    words.append("--stronglyTyped")
    for place, bound in enumerate(("min", "opt", "max")):
        given = (f"{name}:{'x'.join(map(str, s[place]))}" for name, s in shapes.items())
        words.append(f"--{bound}Shapes={','.join(given)}")
    if exact:
        words.append("--noTF32")
    return words


def _polygraphy(
    graph: Path,
    engine: Path,
    shapes: Mapping[str, tuple[Shape, Shape, Shape]],
    exact: bool,
) -> list[str]:
    # Polygraphy leaves TF32 off unless it is asked for.
    words = ["polygraphy", "convert", str(graph), "-o", str(engine), "--strongly-typed"]
    for place, bound in enumerate(("min", "opt", "max")):
        words.append(f"--trt-{bound}-shapes")
        words += [f"{name}:[{','.join(map(str, s[place]))}]" for name, s in shapes.items()]
    return words


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description="Print the lines that build the engines.")
    parser.add_argument("folder", type=Path, help="what less-cache export onnx wrote")
    parser.add_argument("--out", type=Path, default=Path(), help="where to put the engines")
    parser.add_argument("--plugin", type=Path, help="the plugin's library")
    parser.add_argument(
        "--no-alias",
        dest="alias",
        action="store_false",
        help="do not tell TensorRT that the plugin updates the state in place",
    )
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--max-prompt", type=int, default=512)
    parser.add_argument("--polygraphy", action="store_true", help="lines for polygraphy convert")
    given = parser.parse_args(arguments)
    limits = check_limits(
        read_manifest(given.folder, verify=False), given.max_batch, given.max_prompt
    )
    tool = "polygraphy" if given.polygraphy else "trtexec"
    options = {"plugin": given.plugin, "alias": given.alias, "tool": tool}
    for line in command_lines(given.folder, given.out, limits, **options):
        print(line)


if __name__ == "__main__":
    main()
