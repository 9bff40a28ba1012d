"""An ONNX file, of ours or of another tool, run with a look at every layer."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compression.errors import ExportError
from export.graph_editor import GraphEditor
from export.intermediates import (
    FOLLOWER,
    LAYER,
    MOVING,
    RESHAPE,
    SIZE,
    Inputs,
    Operation,
    Point,
    Values,
    points_of,
    share_at_limits,
)
from export.onnx_graph import MAX_BYTES, load_graph, metadata_of
from export.profiles import session_options
from export.temperature import divides_by

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LAYERS = frozenset(
    {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits"}
    | {"QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"}
)
"""Operators that are a layer when one of their operands is stored."""
FAMILIES = {
    **dict.fromkeys(("BatchNormalization", "Dropout", "Identity", "Cast"), FOLLOWER),
    **dict.fromkeys(("Relu", "Clip"), FOLLOWER),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), RESHAPE),
    **dict.fromkeys(("Transpose", "Expand", "Slice"), MOVING),
    **dict.fromkeys(("Gather", "Split", "ConstantOfShape", "Range", "Tile"), MOVING),
    **dict.fromkeys(("Shape", "Size"), SIZE),
    **dict.fromkeys(("ReduceMean", "GlobalAveragePool", "AveragePool", "QLinearGlobalAveragePool"), "Pool"),
    **{"QLinearAdd": "Add", "QLinearMul": "Mul", "QLinearConcat": "Concat"},
    **{"QuantizeLinear": "quantize", "DequantizeLinear": "dequantize"},
}
STEPS = {
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul"), (6, 7)),
    **{"QGemm": (7, 8), "QLinearConcat": (0, 1), "QLinearGlobalAveragePool": (3, 4), "QuantizeLinear": (1, 2)},
}
"""Operator with integer results -> which inputs hold their scale and zero point."""


class OnnxForm:
    """An ONNX file whose points can be looked at: a copy with more outputs, run without graph optimisation.

    Names are module paths where nodes are called ``<path>/<operator>``. Logits that the graph divides by a
    temperature are multiplied by it.
    """

    def __init__(self, path: Path, name: str | None = None, *, threads: int = 1) -> None:
        """Load ``path``.

        Args:
            path: The graph, with any inputs and outputs.
            name: For messages; the file's name if None.
            threads: Intra-op threads.

        Raises:
            ExportError: it is no ONNX graph, or too large for a copy in memory.
        """
        self.path, self.name, self.threads = path, name or path.name, threads
        self.proto = load_graph(path)
        if self.proto.ByteSize() > MAX_BYTES:
            raise ExportError(
                f"Graph '{path.name}' has more than {MAX_BYTES} bytes, expected fewer for a look at its layers."
                " Compare its outputs alone."
            )
        self.scale = divides_by(path)
        editor = GraphEditor(self.proto)
        stored = {tensor.name for tensor in self.proto.graph.initializer}
        self.inputs = [value.name for value in self.proto.graph.input if value.name not in stored]
        self.outputs = [value.name for value in self.proto.graph.output]
        self.paths = any("/" in node.name for node in self.proto.graph.node if node.op_type in LAYERS)
        constants = set(stored)
        operations = []
        for node in self.proto.graph.node:
            if all(name in constants for name in node.input if name):
                constants.update(node.output)
            else:
                operations.append(_operation(node, constants))
        self.points = points_of(operations, self.inputs, self.outputs)
        self._steps = {
            node.output[0]: tuple(
                editor.value(node.input[place]) if place < len(node.input) else None for place in STEPS[node.op_type]
            )
            for node in self.proto.graph.node
            if node.op_type in STEPS
        }

    @cached_property
    def _looking(self) -> Any:
        """A session of the copy that gives every point and the model's outputs."""
        import onnx
        import onnxruntime

        copied: ModelProto = onnx.ModelProto()
        copied.CopyFrom(self.proto)
        wanted = dict.fromkeys(name for point in self.points for name in (point.tensor, point.integers) if name)
        for name in wanted:
            if name not in self.outputs and name not in self.inputs:
                copied.graph.output.append(onnx.ValueInfoProto(name=name))
        options = _options(self.threads)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return _session(copied.SerializeToString(), options, self.name)

    @cached_property
    def shipped(self) -> Any:
        """A session of the file itself, optimised as the runtime likes, or as its form needs."""
        import onnxruntime

        options, wanted = _options(self.threads), session_options(metadata_of(self.path).get("form", ""))
        for key, value in wanted.get("config", {}).items():
            options.add_session_config_entry(key, value)
        if not wanted.get("optimise", True):
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return _session(str(self.path), options, self.name)

    def run(self, inputs: Inputs) -> Values:
        """All points of one small batch, each operator computed as the standard defines it."""
        feeds = self._feeds(inputs)
        session = self._looking
        names = [value.name for value in session.get_outputs()]
        found = dict(zip(names, session.run(names, feeds), strict=True)) | feeds
        at: dict[str, NDArray] = {}
        clipped: dict[str, float] = {}
        for point in self.points:
            value = self._real(point.tensor, found[point.tensor])
            at[point.name] = value * self.scale if point.tensor in self.outputs and self.scale != 1 else value
            if point.integers is not None:
                clipped[point.name] = self._clipped(point, found[point.integers])
        outputs = [_float(found[name]) * self.scale for name in self.outputs]
        return Values(at=at, outputs=outputs, optimised=self.answers(inputs), clipped=clipped)

    def answers(self, inputs: Inputs) -> list[NDArray]:
        """The outputs of the file as the runtime optimises it, float."""
        return [_float(value) * self.scale for value in self.shipped.run(self.outputs, self._feeds(inputs))]

    def _feeds(self, inputs: Inputs) -> dict[str, NDArray]:
        types = {value.name: value.type for value in self.shipped.get_inputs()}
        return {
            name: np.ascontiguousarray(each, dtype=numpy_type(types[name]))
            for name, each in zip(self.inputs, inputs, strict=True)
        }

    def _real(self, tensor: str, value: NDArray) -> NDArray:
        scale, zero_point = self._steps.get(tensor, (None, None))
        if scale is None:
            return _float(value)
        shifted = _float(value) - (0 if zero_point is None else _float(zero_point))
        return shifted * scale if scale.size == 1 else shifted

    def _clipped(self, point: Point, integers: NDArray) -> float:
        _, zero_point = self._steps.get(point.integers or "", (None, None))
        if not np.issubdtype(integers.dtype, np.integer):
            return 0.0  # float8
        limits = np.iinfo(integers.dtype)
        return share_at_limits(integers, limits.min, limits.max, 0 if zero_point is None else int(zero_point.flat[0]))


TYPES = {"float": "float32", "double": "float64", "bool": "bool"}


def numpy_type(onnx_type: str) -> np.dtype:
    """``float32`` for ``tensor(float)``.

    Raises:
        ExportError: numpy has no such type.
    """
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype(TYPES.get(name, name))
    except TypeError as error:
        raise ExportError(
            f"Input has type {onnx_type}, expected a tensor of numbers. Compare files whose inputs are numbers."
        ) from error


def _operation(node: "NodeProto", constants: set[str]) -> Operation:
    sources = tuple(name for name in node.input if name and name not in constants)
    family = FAMILIES.get(node.op_type, node.op_type)
    if node.op_type in LAYERS and any(name in constants for name in node.input[1:] if name):
        family = LAYER
    if node.op_type in LAYERS and node.input[0] in constants:
        family = LAYER  # a stored matrix times activations
    if node.op_type == "Clip" or family == RESHAPE:
        sources = sources[:1]
    place = node.name.rpartition("/")[0]
    named = "/" in node.name
    return Operation(node.output[0], sources, family, place, "" if named else node.name or node.output[0])


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _session(model: str | bytes, options: Any, name: str) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"Graph '{name}' has content ONNX Runtime refuses: {error}. Export it again.") from error


def _float(value: NDArray) -> NDArray:
    return np.asarray(value, dtype=np.float32)
