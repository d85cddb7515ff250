"""One way to call ``torch.onnx.export``: quietly, with named tensors, for a graph to be edited."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnxscript
import torch
from onnx import defs
from onnxscript import ir

from .nodes import DOMAIN

APPEND = "Append"
"""The node that stands for one layer's attention until the graph is put together."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's remarks on itself and on packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def trace(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    opset: int,
) -> ir.Model:
    """Trace ``module(*inputs)``.

    Parameters
    ----------
    module
        Its forward takes the tensors of `inputs` as one list, and returns a list. Each
        ``less_cache::step`` that it calls becomes one `APPEND` node; `outputs_of` finds its
        outputs.
    inputs
        Examples by name. Dynamic axes need sizes of at least 2: the tracer silently takes smaller
        ones for constants.
    outputs
        Names of what forward returns.
    dynamic
        The dynamic axes of each input, and their names.
    opset
        ONNX's opset.
    """
    shapes = [dict(dynamic.get(name, {})) for name in inputs]
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            (list(inputs.values()),),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            custom_translation_table={torch.ops.less_cache.step.default: _bare_node()},
            verbose=False,
        )
    if program is None:
        raise AssertionError("torch.onnx.export returns a program when it writes no file")
    return program.model


def outputs_of(node: ir.Node) -> dict[int, ir.Node]:
    """The ``SequenceAt`` nodes that pick the outputs of an `APPEND` node, by the output's index."""
    taken: dict[int, ir.Node] = {}
    for user, _ in list(node.outputs[0].uses()):
        index = user.inputs[1]
        if user.op_type != "SequenceAt" or index is None:
            raise AssertionError(f"{node.op_type}: used by {user.op_type} as if it were a tensor")
        constant = ir.convenience.get_const_tensor(index)
        if constant is None:
            raise AssertionError(f"{node.op_type}: an output's index is no constant")
        taken[int(constant.numpy())] = user
    return taken


def _bare_node() -> Callable[..., Any]:
    """Translate our operator into a node whose inputs are its tensors, with lists flattened."""
    formal, variadic = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption.Variadic
    schema = defs.OpSchema(
        APPEND,
        DOMAIN,
        1,
        inputs=[formal("x", "T", param_option=variadic, is_homogeneous=False)],
        outputs=[formal("y", "T", param_option=variadic, is_homogeneous=False)],
        type_constraints=[("T", ["tensor(float)"], "")],
    )
    operator = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), APPEND, schema)

    def translate(
        q: Any,
        k: Any,
        v: Any,
        mask: Any,
        length: Any,
        state: Any,
        maps: Any,
        spec: str,
        shift: Any = None,
    ) -> Any:
        last = [] if shift is None else [shift]
        return operator(q, k, v, mask, length, *state, *maps, *last)

    return translate
