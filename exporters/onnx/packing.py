"""The state in two tensors a layer, which is what onnxruntime-genai keeps for recurrent models.

``past_key_values.{i}.recurrent_state`` [B, Hkv, 2 C, D], keys above values, in the model's dtype;
or [B, Hkv, C, bytes] uint8, the codes of a key and a value side by side.
``past_key_values.{i}.conv_state`` [B, Hkv, N], float32: scores where slots keep them, positions
+ 1, the history in three parts, the scales of codes, H, z, and last the length. So zeros are an
empty state. Positions are exact up to 2^24.

The library expects the tensors of all layers to have the same shape: smaller ones, smaller heads of
a layer, and pairs of fewer bytes are filled up with zeros. Past and present may share memory: a
present tensor is written last, when its layer has read all of the past ones.
"""

from __future__ import annotations

from onnxscript import ir

from less_cache.quantization.codes import SCALE_DTYPE

from .building import KINDS, Builder, Value
from .decoder import BATCH
from .heads import HeadRun, ModelLayer
from .parts import Layer, Values, pair_widths

PAST, PRESENT = "past_key_values", "present"
HISTORY_PARTS, PART_BITS = 3, 21
"""A history has up to 62 bits, and a float32 holds only 24 exactly."""


def pack_state(model: ir.Model, layers: list[ModelLayer]) -> None:
    """Replace the state's inputs and outputs of an assembled graph by packed ones."""
    graph = model.graph
    old_inputs = {str(value.name): value for value in graph.inputs}
    results: Values = {}
    for value in graph.outputs:
        results[str(value.name)] = value
    tokens, logits = list(graph.inputs[:2]), graph.outputs[0]
    front = ir.Graph([], [], nodes=[], name="front")
    unpack, pack = Builder(front, "unpack"), Builder(graph, "pack")
    inputs, outputs = tokens, [logits]
    runs = [run for layer in layers for run in layer.runs]
    sizes = (
        max(sum(_columns(run.layer).values()) for run in runs),
        max(_rows(run.layer) for run in runs),
        max(_row(run.layer)[0] for run in runs),
    )
    for layer in layers:
        packed = _inputs(layer, sizes)
        inputs.extend(packed.values())
        if not layer.index:
            length = _first_length(unpack, layer.runs[0].layer, packed["conv"])
            ir.convenience.replace_all_uses_with(old_inputs["past.length"], length)
        parts = []
        for run in layer.runs:
            past = _unpacked(unpack, run.layer, _heads(unpack, layer, run, packed))
            for name, full in run.arrays.items():
                ir.convenience.replace_all_uses_with(old_inputs[f"past.{full}"], past[name])
            present = {name: results[f"present.{full}"] for name, full in run.arrays.items()}
            for name, value in present.items():
                value.name = f"state.{run.arrays[name]}"
            parts.append(_packed(pack, run.layer, sizes, present, results["present.length"]))
        outputs.extend(_joined(pack, layer, sizes, parts))
    results["present.length"].name = "state.length"
    graph.inputs[:] = inputs
    graph.outputs[:] = outputs
    nodes = list(front)
    front.remove(nodes)
    graph.insert_before(graph[0], nodes)


def hide_padding(model: ir.Model, pad_token: int) -> None:
    """Treat padding tokens at the start of a sequence as padding, whatever the mask says.

    Parameters
    ----------
    model
        An assembled graph whose state is not packed yet.
    pad_token
        The token.
    """
    graph = model.graph
    ids, mask, length = graph.inputs[:3]
    front = ir.Graph([], [], nodes=[], name="padding")
    b = Builder(front, "padding")
    users = list(mask.uses())
    tokens = b("Not", b("Equal", ids, b.constant(pad_token, "int64")))
    begun = b("CumSum", b.cast(tokens, "int32"), b.constant(1, "int64"))
    begun = b("Greater", b("Add", begun, b.unsqueeze(length, 1)), b.constant(0, "int32"))
    new = b("Slice", mask, b("Neg", b.dim(ids, 1)), b.ints(2**31 - 1), b.ints(1))
    told = b("Mul", new, b.cast(begun, "int64"))
    for user, position in users:
        user.replace_input_with(position, told)
    nodes = list(front)
    front.remove(nodes)
    graph.insert_before(graph[0], nodes)


def _columns(layer: Layer) -> dict[str, int]:
    """How many columns of ``conv_state`` each array takes, in order."""
    config = layer.config
    sizes = {"scores": config.capacity} if config.keeps_scores else {}
    sizes["positions"] = config.capacity
    if config.policy.history_window:
        sizes["history"] = HISTORY_PARTS * config.capacity
    if config.quantization is not None:
        sizes.update(key_scales=config.capacity, value_scales=config.capacity)
    if layer.kind is not None:
        sizes.update(H=config.rank * config.head_dim, z=config.rank)
    return {**sizes, "length": 1}


def _rows(layer: Layer) -> int:
    """How many rows of ``recurrent_state`` the pairs of one head take."""
    config = layer.config
    return config.capacity if config.quantization is not None else 2 * config.capacity


def _row(layer: Layer) -> tuple[int, str]:
    """The size of a row, and its dtype."""
    widths, config = pair_widths(layer), layer.config
    if config.quantization is None:
        return config.head_dim, config.dtype
    return widths["keys"] + widths["values"], layer.code_dtype


def _heads(b: Builder, layer: ModelLayer, run: HeadRun, packed: Values) -> Values:
    """The packed tensors of a run's heads alone."""
    if len(layer.runs) == 1:
        return packed
    heads = run.run.kv_heads
    bounds = b.ints(heads.start), b.ints(heads.stop), b.ints(1)
    return {name: b("Slice", value, *bounds) for name, value in packed.items()}


def _inputs(layer: ModelLayer, sizes: tuple[int, int, int]) -> Values:
    config = layer.config
    dtype = _row(layer.runs[0].layer)[1]
    heads = (BATCH, config.kv_heads)
    return {
        "conv": ir.val(
            f"{PAST}.{layer.index}.conv_state",
            ir.DataType.FLOAT,
            ir.Shape([*heads, sizes[0]]),
        ),
        "recurrent": ir.val(
            f"{PAST}.{layer.index}.recurrent_state",
            KINDS[dtype],
            ir.Shape([*heads, *sizes[1:]]),
        ),
    }


def _unpacked(b: Builder, layer: Layer, packed: Values) -> Values:
    config = layer.config
    capacity, axis = config.capacity, b.ints(2)
    past: Values = {}
    if config.quantization is None:
        for place, name in enumerate(("keys", "values")):
            bounds = b.ints(place * capacity), b.ints((place + 1) * capacity)
            past[name] = b("Slice", packed["recurrent"], *bounds, axis)
    else:
        widths = pair_widths(layer)
        stop = b.ints(capacity, sum(widths.values()))
        held = b("Slice", packed["recurrent"], b.ints(0, 0), stop, b.ints(2, 3))
        bytes_each = b.ints(widths["keys"], widths["values"])
        past["keys"], past["values"] = b.many("Split", [held, bytes_each], 2, axis=3)
    start = 0
    for name, size in _columns(layer).items():
        if name != "length":
            past[name] = b("Slice", packed["conv"], b.ints(start), b.ints(start + size), axis)
        start += size
    past["positions"] = b("Sub", b.cast(past["positions"], "int32"), b.constant(1, "int32"))
    for name in ("key_scales", "value_scales"):
        if name in past:
            past[name] = b.cast(past[name], SCALE_DTYPE, "float32")
    if "history" in past:
        parts = b.many(
            "Split",
            [b.cast(past["history"], "int64")],
            HISTORY_PARTS,
            axis=2,
            num_outputs=HISTORY_PARTS,
        )
        total = parts[0]
        for place, part in enumerate(parts[1:], start=1):
            worth = b.constant(2 ** (PART_BITS * place), "int64")
            total = b("Add", total, b("Mul", part, worth))
        past["history"] = total
    if "H" in past:
        past["H"] = b.reshape(past["H"], 0, config.kv_heads, config.rank, config.head_dim)
        for name in ("H", "z"):
            past[name] = b.cast(past[name], config.state_dtype, "float32")
    return past


def _packed(
    b: Builder,
    layer: Layer,
    sizes: tuple[int, int, int],
    present: Values,
    length: Value,
) -> tuple[Value, Value]:
    """``conv_state`` and ``recurrent_state`` of the heads of `layer`."""
    config = layer.config
    later = b("Add", present["positions"], b.constant(1, "int32"))
    columns = {"positions": b.cast(later, "float32")}
    if "scores" in present:
        columns["scores"] = present["scores"]
    if "history" in present:
        parts, rest = [], present["history"]
        whole = b.constant(2**PART_BITS, "int64")
        for _ in range(HISTORY_PARTS):
            parts.append(b.cast(b("Mod", rest, whole), "float32"))
            rest = b("Div", rest, whole)
        columns["history"] = b("Concat", *parts, axis=2)
    for name in ("key_scales", "value_scales"):
        if name in present:
            columns[name] = b.cast(present[name], "float32", SCALE_DTYPE)
    if "H" in present:
        flat = b.reshape(present["H"], 0, config.kv_heads, -1)
        columns["H"] = b.cast(flat, "float32", config.state_dtype)
        columns["z"] = b.cast(present["z"], "float32", config.state_dtype)
    wide = b.cast(b.unsqueeze(length, 1, 2), "float32")
    columns["length"] = b("Expand", wide, b.ints(1, config.kv_heads, 1))
    conv = b("Concat", *(columns[name] for name in _columns(layer)), axis=2)
    conv = _filled(b, conv, sizes[0] - sum(_columns(layer).values()))
    coded = config.quantization is not None
    recurrent = b("Concat", present["keys"], present["values"], axis=3 if coded else 2)
    return conv, _filled(b, recurrent, sizes[1] - _rows(layer), sizes[2] - _row(layer)[0])


def _joined(
    b: Builder, layer: ModelLayer, sizes: tuple[int, int, int], parts: list[tuple[Value, Value]]
) -> list[Value]:
    """The packed tensors of all of a layer's heads, as outputs of the graph."""
    outputs = []
    likes = _inputs(layer, sizes).values()
    for name, like, part in zip(
        ("conv_state", "recurrent_state"), likes, zip(*parts, strict=True), strict=True
    ):
        value = part[0] if len(part) == 1 else b("Concat", *part, axis=1)
        value.name = f"{PRESENT}.{layer.index}.{name}"
        value.type, value.shape = like.type, like.shape
        outputs.append(value)
    return outputs


def _filled(b: Builder, array: Value, *missing: int) -> Value:
    """An array [B, heads, ...], its last axes longer by so many zeros each."""
    if not any(missing):
        return array
    return b("Pad", array, b.ints(*(0,) * (len(missing) + 4), *missing))


def _first_length(b: Builder, layer: Layer, conv: Value) -> Value:
    """[B] int32, from the first head's last column."""
    columns = sum(_columns(layer).values())
    head = b("Slice", conv, b.ints(0), b.ints(1), b.ints(1))
    length = b("Slice", head, b.ints(columns - 1), b.ints(columns), b.ints(2))
    return b.cast(b.reshape(length, -1), "int32")
