"""`build_engines`: an exported model as two TensorRT engines, one for steps and one for prompts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorrt as trt

from exporters.common.folders import replaced_files
from exporters.common.manifest import Manifest, read_manifest
from less_cache._checks import check_int
from less_cache._files import replaced

from .cuda import device_info, selected
from .files import ENGINE_MANIFEST, PROMPT_ENGINE, STEP_ENGINE, write_engine_manifest
from .graphs import derive_graphs
from .library import Log, load_plugin
from .limits import Limits, Shape, check_limits, input_shapes
from .progress import Monitor


@dataclass(frozen=True)
class _Options:
    """What both engines of a build have in common."""

    workspace: int | None
    optimization_level: int | None
    timing_cache: Path | None
    exact: bool
    progress: bool


def build_engines(
    onnx_dir: str | Path,
    out_dir: str | Path,
    *,
    max_batch: int = 1,
    max_prompt: int = 512,
    opt_batch: int | None = None,
    opt_prompt: int | None = None,
    plugin: str | Path | None = None,
    alias: bool = True,
    workspace: int | None = None,
    optimization_level: int | None = None,
    timing_cache: str | Path | None = None,
    device: int = 0,
    progress: bool = True,
    verbose: bool = False,
    verify: bool = True,
) -> Path:
    """Build an exported model's engines, which `TensorRTDecoder` runs.

    The engines compute in the types of the exported file. They run only with this version of
    TensorRT and on GPUs of this compute capability. Ctrl-C ends a build; nothing is written then.

    Parameters
    ----------
    onnx_dir
        What `exporters.onnx.export_decoder` wrote. The two graphs that TensorRT reads are
        written there, too; see `derive_graphs`.
    out_dir
        The folder. Made if it is not there; engines of an earlier build in it are replaced.
    max_batch, max_prompt
        The most sequences, and the most tokens of each at once. The logits of a prompt's attention
        are held whole, 4 bytes x batch x query heads x tokens x (tokens + capacity) for a layer.
    opt_batch, opt_prompt
        What the engines are tuned for. Default: the largest.
    plugin
        The library of the plugin ``LessAttention``, which is copied into the folder. Without it
        the step is in standard operators: slower, and with the state copied once a step.
    alias
        Tell TensorRT that the plugin updates the state in place. It may then insert copies of its
        own; without, it takes past and present for two tensors, which may be bound to one address
        all the same. Nobody has measured yet which is faster.
    workspace
        The most bytes of GPU memory that a layer may use besides its tensors. Default: TensorRT's.
    optimization_level
        0 to 5: how long to search for fast kernels. Default: TensorRT's own, 3.
    timing_cache
        A file of kernels' times. It is read if it exists and written again, and makes later
        builds on the same GPU shorter.
    device
        The GPU's index.
    progress
        Show bars.
    verbose
        Print all of TensorRT's messages.
    verify
        Compare the digest of every exported file with the manifest's; otherwise only the sizes.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileNotFoundError
        If the exported folder, one of its files or the plugin's library is missing.
    TypeError, ValueError
        If an argument or a file is not what it should be, or TensorRT refuses the model, the
        library or the timing cache.
    RuntimeError
        If TensorRT cannot build an engine, or there is no GPU.
    KeyboardInterrupt
        After Ctrl-C.
    """
    manifest = read_manifest(onnx_dir, verify=verify)
    limits = check_limits(manifest, max_batch, max_prompt, opt_batch, opt_prompt)
    if workspace is not None:
        check_int("workspace", workspace, minimum=1)
    if optimization_level is not None:
        check_int("optimization_level", optimization_level, minimum=0, maximum=5)
    gpu = device_info(device)
    library = Path(plugin) if plugin is not None else None
    if library is not None:
        load_plugin(library)
    step_graph, prompt_graph = derive_graphs(onnx_dir, plugin=library is not None, verify=False)
    options = _Options(
        workspace=workspace,
        optimization_level=optimization_level,
        timing_cache=Path(timing_cache) if timing_cache is not None else None,
        exact=manifest.config.dtype == "float32",
        progress=progress,
    )
    log = Log(verbose)
    with selected(device), replaced_files(Path(out_dir), last=ENGINE_MANIFEST) as folder:
        for name, graph, aliased in (
            (STEP_ENGINE, step_graph, library is not None and alias),
            (PROMPT_ENGINE, prompt_graph, False),
        ):
            shapes = input_shapes(manifest, limits, step=name == STEP_ENGINE)
            plan = _build(log, graph, shapes, options, aliased=aliased)
            (folder / name).write_bytes(plan)
        names = [STEP_ENGINE, PROMPT_ENGINE]
        if library is not None:
            names.append(library.name)
            shutil.copyfile(library, folder / library.name)
        _describe(folder, names, manifest, limits, gpu, library)
    return Path(out_dir)


def describe_engines(
    onnx_dir: str | Path,
    engine_dir: str | Path,
    *,
    max_batch: int,
    max_prompt: int,
    plugin: str | Path | None = None,
    device: int = 0,
    verify: bool = True,
) -> Path:
    """Write the manifest of engines that were built by other means; see `trtexec.command_lines`.

    Parameters
    ----------
    onnx_dir
        What the engines were built from.
    engine_dir
        Has ``step.engine`` and ``prompt.engine``.
    max_batch, max_prompt
        The largest shapes that both were built for.
    plugin
        The library of the plugin that the step was built with; copied into the folder.
    device
        The GPU that they were built on.
    verify
        Compare the digest of every exported file with the manifest's; otherwise only the sizes.

    Returns
    -------
    Path
        The folder of the engines.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    TypeError, ValueError, RuntimeError
        See `build_engines`.
    """
    manifest = read_manifest(onnx_dir, verify=verify)
    limits = check_limits(manifest, max_batch, max_prompt)
    folder, library = Path(engine_dir), Path(plugin) if plugin is not None else None
    for path in (folder / STEP_ENGINE, folder / PROMPT_ENGINE, library):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    gpu = device_info(device)
    names = [STEP_ENGINE, PROMPT_ENGINE]
    if library is not None:
        names.append(library.name)
        if library.resolve() != (folder / library.name).resolve():
            shutil.copyfile(library, folder / library.name)
    _describe(folder, names, manifest, limits, gpu, library)
    return folder


def _describe(
    folder: Path,
    names: list[str],
    manifest: Manifest,
    limits: Limits,
    gpu: dict[str, Any],
    library: Path | None,
) -> None:
    write_engine_manifest(
        folder,
        names,
        manifest,
        limits,
        tensorrt=trt.__version__,
        device=gpu,
        plugin=library.name if library is not None else None,
    )


def _build(
    log: Log,
    graph: Path,
    shapes: Mapping[str, tuple[Shape, Shape, Shape]],
    options: _Options,
    *,
    aliased: bool,
) -> memoryview:
    """One engine, serialised."""
    builder = trt.Builder(log)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    _parse(log, network, graph)
    config = builder.create_builder_config()
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.exact:
        config.clear_flag(trt.BuilderFlag.TF32)
    if aliased:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    profile = builder.create_optimization_profile()
    for name, (least, usual, largest) in shapes.items():
        profile.set_shape(name, least, usual, largest)
    if config.add_optimization_profile(profile) < 0:
        raise RuntimeError(f"{graph}: TensorRT refuses the shapes {dict(shapes)}: {log.taken()}")
    _read_timing_cache(log, config, options.timing_cache)
    with Monitor(graph.stem, options.progress) as monitor:
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor.cancelled:
        raise KeyboardInterrupt
    if plan is None:
        raise RuntimeError(f"{graph}: TensorRT cannot build an engine: {log.taken()}")
    _write_timing_cache(config, options.timing_cache)
    return memoryview(plan)


def _parse(log: Log, network: trt.INetworkDefinition, graph: Path) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(graph)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    told = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors]
    raise ValueError(
        f"{graph}: TensorRT {trt.__version__} cannot read it: {'; '.join(told) or log.taken()}"
    )


def _read_timing_cache(log: Log, config: trt.IBuilderConfig, path: Path | None) -> None:
    if path is None:
        return
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ValueError(
            f"timing_cache: {path}: of another TensorRT or GPU, or damaged: {log.taken()}"
        )


def _write_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> None:
    if path is not None:
        with replaced(path) as temporary:
            temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
