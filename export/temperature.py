"""The temperature of a graph: stored in its metadata, and on request part of its last layer.

Dividing the logits by T is dividing the weight and the bias of the layer that makes them. In a quantized graph it
is dividing the scales these are read with, so integers stay as they are. Where the logits come from something else,
one multiplication is added at the end.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compression.errors import ExportError
from export.graph_editor import GraphEditor
from export.onnx_graph import GraphInfo, check_graph, load_graph, metadata_of, save_graph

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

TEMPERATURE, APPLIED = "temperature", "temperature_applied"
"""Keys in the metadata: the number, and ``true`` where the graph divides by it itself."""

LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
SCALE_KEEPING = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators with f(x / T) = f(x) / T."""


def store_temperature(source: Path, target: Path, value: float, *, apply: bool) -> GraphInfo:
    """Facts about the copy of ``source`` that knows its temperature; ``target`` may be ``source``.

    Guo et al. 2017 (arXiv:1706.04599).

    Args:
        source: A graph with one output, the logits [batch, classes].
        target: Where the copy goes.
        value: The temperature, above 0.
        apply: Whether the copy gives logits / ``value``. Number and order of nodes stay, except where the logits
            don't come straight from one layer: there a Mul follows.

    Raises:
        ExportError: the value is not usable, the graph divides by a temperature already, or it has more outputs.
    """
    if not (math.isfinite(value) and value > 0):
        raise ExportError(f"Temperature has {value}, expected a finite number above 0. Fit it again.")
    proto = load_graph(source)
    if divides_by(source) != 1.0:
        raise ExportError(
            f"Graph '{source.name}' has logits divided by {divides_by(source):g} already, expected undivided ones."
            " Export it again."
        )
    if apply:
        _divide(proto, source, value)
    metadata = metadata_of(source) | {TEMPERATURE: repr(float(value)), APPLIED: "true" if apply else "false"}
    save_graph(proto, target, metadata=metadata)
    return check_graph(target)


def temperature_of(path: Path) -> float | None:
    """The temperature a graph says it should be, or is, divided by; None where it was not fitted."""
    found = metadata_of(path).get(TEMPERATURE)
    try:
        return None if found is None else float(found)
    except ValueError as error:
        raise ExportError(
            f"Graph '{path.name}' has temperature '{found}', expected a number. Export it again."
        ) from error


def divides_by(path: Path) -> float:
    """What the graph itself divides its logits by: multiply them by it to get the model's own."""
    found = temperature_of(path)
    return found if found is not None and metadata_of(path).get(APPLIED) == "true" else 1.0


def temperature_entries(path: Path) -> dict[str, str]:
    """The metadata about the temperature, for a graph that is made from this one."""
    return {key: value for key, value in metadata_of(path).items() if key in (TEMPERATURE, APPLIED)}


def _divide(proto: "ModelProto", source: Path, value: float) -> None:
    if len(proto.graph.output) != 1:
        raise ExportError(
            f"Graph '{source.name}' has {len(proto.graph.output)} outputs, expected the logits alone."
            " Export it without the others."
        )
    editor = GraphEditor(proto)
    output = proto.graph.output[0].name
    # Where the constants are read, and what will be there; nothing changes before all of them are known.
    edits = None if editor.users(output) else _edits(editor, output, value)
    if edits is None:
        _append(editor, output, value)
    for node, place, scaled in edits or ():
        node.input[place] = editor.constant(scaled, f"{node.input[place]}_scaled")
    editor.drop_unused()


Edit = tuple["NodeProto", int, NDArray]
"""A node, the position of one of its inputs, and the constant that goes there."""


def _edits(editor: GraphEditor, name: str, value: float) -> list[Edit] | None:
    """What makes the tensor ``name``, which has no other reader, that times 1 / ``value``; None: can't be done."""
    node = editor.makers.get(name)
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":  # of logits that leave as integers, or of a stored weight
        return _scaled(editor, node, 1, value)
    if node.op_type in SCALE_KEEPING:
        return _operand(editor, node, 0, value)
    if node.op_type == "Add":
        parts = [_operand(editor, node, place, value) for place in (0, 1)]
    elif node.op_type in LAYERS:
        parts = [_operand(editor, node, 1, value, stored=True)]
        if len(node.input) > 2 and node.input[2]:
            parts.append(_operand(editor, node, 2, value, stored=True))
    else:
        return None
    return None if any(part is None for part in parts) else [edit for part in parts for edit in part or ()]


def _operand(
    editor: GraphEditor, node: "NodeProto", place: int, value: float, *, stored: bool = False
) -> list[Edit] | None:
    """Edits for one input of a node: its constant, or what makes it; ``stored`` refuses activations."""
    name = node.input[place]
    if editor.value(name) is not None:
        return _scaled(editor, node, place, value)
    if len(editor.users(name)) != 1 or (stored and not _is_stored(editor, name)):
        return None
    return _edits(editor, name, value)


def _scaled(editor: GraphEditor, node: "NodeProto", place: int, value: float) -> list[Edit] | None:
    """The constant at an input divided by ``value``, rounded once; None if it is no float or leaves its range."""
    constant = editor.value(node.input[place])
    if constant is None or not np.issubdtype(constant.dtype, np.floating):
        return None
    with np.errstate(over="ignore"):
        divided = (constant.astype(np.float64) / value).astype(constant.dtype)
    return [(node, place, divided)] if np.isfinite(divided).all() else None


def _is_stored(editor: GraphEditor, name: str) -> bool:
    """Whether a tensor depends on constants only, through dequantizers and reshapes."""
    while editor.value(name) is None:
        node = editor.makers.get(name)
        if node is None or node.op_type not in SCALE_KEEPING | {"DequantizeLinear"}:
            return False
        name = node.input[0]
    return True


def _append(editor: GraphEditor, output: str, value: float) -> None:
    import onnx

    undivided = f"{output}_undivided"
    for node in editor.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == output:
                    names[place] = undivided
    dtype = onnx.helper.tensor_dtype_to_np_dtype(editor.graph.output[0].type.tensor_type.elem_type)
    factor = editor.constant(np.asarray(1.0 / value, dtype), "inverse_temperature")
    editor.graph.node.append(onnx.helper.make_node("Mul", [undivided, factor], [output], name="temperature/Mul"))
    editor.index()
