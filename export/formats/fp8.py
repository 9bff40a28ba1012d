"""FP8: activations and weights of convolutions and linear layers in 8-bit floats (e4m3).

Four bits of exponent, three of mantissa, largest value 448, no infinities (Micikevicius et al. 2022,
arXiv:2209.05433), with one scale per tensor: ``scale = amax / 448``. Written as the standard's own QuantizeLinear and
DequantizeLinear, which TensorRT reads on GPUs from Ada (SM89) on. Nothing is trained; ranges are the extremes over
calibration images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compression.errors import ExportError
from export.formats.opset import with_opset
from export.graph_editor import GraphEditor
from export.onnx_graph import INPUT_NAME, GraphInfo, check_graph, load_graph, save_graph

if TYPE_CHECKING:
    from onnx import NodeProto

OPSET = 19
"""The first with 8-bit floats."""
LARGEST = 448.0
"""Largest finite e4m3 value."""
LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
BATCH = 64


def activation_ranges(source: Path, images: NDArray[np.float32]) -> dict[str, float]:
    """Largest magnitude over the images of each tensor that a layer with a stored weight reads.

    Args:
        source: A float32 graph.
        images: Normalised images [N, C, H, W] float32.

    Raises:
        ExportError: there are no images, or the graph doesn't run.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    if len(images) == 0:
        raise ExportError("Calibration has 0 images, expected at least 1. Give the calibration split a share.")
    proto = load_graph(source)
    names = sorted({node.input[0] for node in _layers(GraphEditor(proto))})
    inner = [name for name in names if name != INPUT_NAME]
    outputs = {entry.name for entry in proto.graph.output}
    proto.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inner if name not in outputs
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        ranges = dict.fromkeys(names, 0.0)
        for start in range(0, len(images), BATCH):
            batch = np.ascontiguousarray(images[start : start + BATCH], np.float32)
            found: dict[str, Any] = dict(zip(inner, session.run(inner, {INPUT_NAME: batch}), strict=True))
            for name in names:
                values = batch if name == INPUT_NAME else found[name]
                ranges[name] = max(ranges[name], float(np.abs(values).max()))
    except Exception as error:
        raise ExportError(
            f"Graph '{source.name}' has content ONNX Runtime refuses: {error}. Give the float32 file of the model."
        ) from error
    return ranges


def to_fp8(
    source: Path, target: Path, ranges: Mapping[str, float], *, metadata: Mapping[str, str] | None = None
) -> GraphInfo:
    """Facts about the copy of a float32 graph whose layers read FP8 activations and FP8 weights.

    Biases, additions and what else lies between the layers stay float32.

    Args:
        source: A float32 graph.
        target: Where the copy goes.
        ranges: Largest magnitude of each tensor a layer reads, see ``activation_ranges``.
        metadata: Stored in the file; None keeps the source's.

    Raises:
        ExportError: a range is missing, or the graph has no layers.
    """
    from onnx import helper

    proto = with_opset(load_graph(source), OPSET)
    editor = GraphEditor(proto)
    layers = list(_layers(editor))
    if not layers:
        raise ExportError(
            f"Graph '{source.name}' has no layers with stored weights, expected some. Give a float32 file."
        )
    missing = sorted({node.input[0] for node in layers} - set(ranges))
    if missing:
        raise ExportError(
            f"Graph '{source.name}' has no range of '{missing[0]}', expected one per tensor that a layer reads."
            " Calibrate this very graph."
        )
    rounded: dict[str, str] = {}
    for node in layers:
        name, source_name = node.name or node.output[0], node.input[0]
        position = list(proto.graph.node).index(node)
        new: list[NodeProto] = []
        if source_name not in rounded:
            pair = [editor.constant(_scale(ranges[source_name]), f"{source_name}_fp8_scale"), _zero(editor)]
            packed, output = f"{source_name}_fp8", f"{source_name}_fp8_value"
            new += [
                helper.make_node("QuantizeLinear", [source_name, *pair], [packed], name=f"{packed}/QuantizeLinear"),
                helper.make_node("DequantizeLinear", [packed, *pair], [output], name=f"{packed}/DequantizeLinear"),
            ]
            rounded[source_name] = output
        weight = editor.required(node.input[1])
        scale = _scale(float(np.abs(weight).max()))
        stored = [
            editor.constant(_to_e4m3(weight / scale), f"{name}_fp8_weight"),
            editor.constant(scale, f"{name}_fp8_weight_scale"),
            _zero(editor),
        ]
        unpacked = f"{name}_fp8_weight_value"
        new.append(helper.make_node("DequantizeLinear", stored, [unpacked], name=f"{name}_weight/DequantizeLinear"))
        node.input[0], node.input[1] = rounded[source_name], unpacked
        for offset, added in enumerate(new):
            proto.graph.node.insert(position + offset, added)
    editor.index()
    del proto.graph.value_info[:]
    editor.drop_unused()
    save_graph(proto, target, metadata=metadata)
    return check_graph(target)


def _layers(editor: GraphEditor) -> list["NodeProto"]:
    """Convolutions and products with a stored weight."""
    return [
        node
        for node in editor.graph.node
        if node.op_type in LAYERS and len(node.input) > 1 and editor.value(node.input[1]) is not None
    ]


def _scale(largest: float) -> NDArray[np.float32]:
    return np.asarray(largest / LARGEST if largest > 0 else 1.0, np.float32)


def _to_e4m3(values: NDArray) -> NDArray:
    """Rounded to nearest, ties to even, saturated at 448."""
    import ml_dtypes

    return np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)


def _zero(editor: GraphEditor) -> str:
    import ml_dtypes

    return editor.constant(np.zeros((), ml_dtypes.float8_e4m3fn), "fp8_zero")
