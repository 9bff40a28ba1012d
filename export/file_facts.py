"""What an ONNX file is made of, as far as its speed and size depend on it."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from compression.types import Frozen
from export.feed import Shapes
from export.onnx_graph import load_graph
from export.operator_profile import LayerNames, Operators, profile_operators
from export.runtime import constants_of, is_weighted, weight_input

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

Quantization = Literal["none", "static", "dynamic", "weights only"]

DYNAMIC = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
SMALLEST_COPY = 1024
"""Tensors of fewer bytes are scales, biases and other small change."""


class LayerFacts(Frozen):
    """A layer with weights."""

    layer: str
    operator: str
    """As it is stored."""
    output_channels: int
    groups: int = 1
    weights: int = 0
    """Elements."""
    dtype: str = "float32"
    """How the weights are stored."""
    quantized: bool = False
    """Whether the weights are integers, or pass a quantizer."""

    @property
    def width(self) -> int:
        """Channels that one kernel computes: all, or those of one group; a depthwise layer counts with all."""
        return self.output_channels if self.groups in (1, self.output_channels) else self.output_channels // self.groups


class FileFacts(Frozen):
    """One file: how it is stored, and what ONNX Runtime makes of it."""

    name: str
    size_bytes: int
    """With the files beside it that hold its weights."""
    external_bytes: int = 0
    """The part in files beside it."""
    parameters: int = 0
    """Stored numbers of layers with weights, each tensor once."""
    weight_bytes: int = 0
    """Bytes of all stored tensors."""
    duplicate_bytes: int = 0
    """Bytes of tensors that are stored a second time."""
    duplicates: tuple[str, ...] = ()
    """Their names."""
    quantization: Quantization = "none"
    activations: dict[str, int] = {}
    """Activation quantizers by what they write: uint8, int8 (with a zero point), int8 symmetric, ..."""
    layers: tuple[LayerFacts, ...] = ()
    """In the order of the graph."""
    float_weights: tuple[str, ...] = ()
    """Layers whose weights are stored as floats in front of a quantizer."""
    hidden_constants: tuple[str, ...] = ()
    """Layers that read a weight or bias through an Identity."""
    wide_weights: bool = False
    """Whether signed 8-bit weights use more than 7 bits."""
    operators: Operators

    def bytes_per_parameter(self) -> float:
        """Size of the file over its parameters."""
        return self.size_bytes / max(self.parameters, 1)


def examine(
    path: Path,
    *,
    name: str | None = None,
    threads: int = 1,
    batch: int | None = 1,
    shapes: Shapes | None = None,
    seed: int = 0,
    seconds: float = 0.3,
) -> FileFacts:
    """Read a file and profile what ONNX Runtime makes of it, see ``profile_operators``.

    Raises:
        ExportError: the file is missing, cannot be loaded, or does not run at this batch size.
    """
    proto = load_graph(path)
    operators = profile_operators(path, threads=threads, batch=batch, shapes=shapes, seed=seed, seconds=seconds)
    return facts_of(proto, operators, name=name or path.name, **size_of(path))


def size_of(path: Path) -> dict[str, int]:
    """``size_bytes`` and ``external_bytes`` of a file."""
    import onnx

    plain = onnx.load(str(path), load_external_data=False)
    beside = {
        entry.value
        for tensor in plain.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location" and tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    external = sum((path.parent / each).stat().st_size for each in beside)
    return {"size_bytes": path.stat().st_size + external, "external_bytes": external}


def facts_of(
    proto: "ModelProto", operators: Operators, *, name: str, size_bytes: int, external_bytes: int = 0
) -> FileFacts:
    """What a graph is made of; a pure function."""
    graph = proto.graph
    constants = constants_of(graph)
    makers = {output: node for node in graph.node for output in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    names = LayerNames(graph)
    weighted = [node for node in graph.node if is_weighted(node, constants)]
    layers, float_weights, hidden, weights = [], [], [], {}
    for node in weighted:
        layer = names.weighted[node.output[0]]
        way = [each.op_type for each in _way(makers, weight_input(node))]
        tensor = stored.get(names.source(weight_input(node)))
        if tensor is not None:
            weights[tensor.name] = tensor
        layers.append(_layer(layer, node, tensor, way))
        if tensor is not None and "QuantizeLinear" in way and _is_float(tensor):
            float_weights.append(layer)
        bias = node.input[2] if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) > 2 else ""
        if "Identity" in way or any(each.op_type == "Identity" for each in _way(makers, bias)):
            hidden.append(layer)
    copies = _copies(graph)
    activations = _activations(graph, constants, stored)
    return FileFacts(
        name=name,
        size_bytes=size_bytes,
        external_bytes=external_bytes,
        parameters=sum(_elements(tensor) for tensor in weights.values()),
        weight_bytes=sum(_bytes(tensor) for tensor in graph.initializer),
        duplicate_bytes=sum(_bytes(stored[each]) for each in copies),
        duplicates=tuple(copies),
        quantization=_quantization(graph, layers, activations),
        activations=activations,
        layers=tuple(layers),
        float_weights=tuple(float_weights),
        hidden_constants=tuple(hidden),
        wide_weights=any(_is_wide(tensor) for tensor in weights.values()),
        operators=operators,
    )


def _quantization(graph: "GraphProto", layers: list[LayerFacts], activations: dict[str, int]) -> Quantization:
    operators = {node.op_type for node in graph.node}
    if operators & DYNAMIC:
        return "dynamic"
    if activations or any(operator.startswith(("QLinear", "QGemm")) for operator in operators):
        return "static"
    return "weights only" if any(layer.quantized for layer in layers) else "none"


def _layer(layer: str, node: "NodeProto", tensor: "TensorProto | None", way: list[str]) -> LayerFacts:
    import onnx

    attributes = {each.name: each for each in node.attribute}
    groups = attributes["group"].i if "group" in attributes else 1
    sizes = list(tensor.dims) if tensor is not None else [0]
    transposed = "transB" in attributes and attributes["transB"].i
    if node.op_type == "ConvTranspose":
        channels = sizes[1] * groups if len(sizes) > 1 else 0
    elif "Conv" in node.op_type or transposed:
        channels = sizes[0]
    elif node.op_type == "MatMulNBits":
        channels = attributes["N"].i
    else:
        channels = sizes[0] if "Transpose" in way else sizes[-1]
    dtype = onnx.TensorProto.DataType.Name(tensor.data_type).lower() if tensor is not None else "computed"
    dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
    integer = dtype in ("int8", "uint8", "int4", "uint4", "int2", "uint2")
    return LayerFacts(
        layer=layer,
        operator=node.op_type,
        output_channels=channels,
        groups=groups,
        weights=_elements(tensor) if tensor is not None else 0,
        dtype=dtype,
        quantized=integer or "QuantizeLinear" in way,
    )


def _way(makers: dict[str, "NodeProto"], tensor: str) -> list["NodeProto"]:
    """The nodes between a layer's input and the stored tensor, nearest first."""
    found = []
    while (maker := makers.get(tensor)) is not None and maker.input:
        found.append(maker)
        tensor = maker.input[0]
    return found


def _activations(graph: "GraphProto", constants: set[str], stored: dict[str, "TensorProto"]) -> dict[str, int]:
    """Quantizers of computed tensors by type of zero point; without one it is uint8."""
    from onnx import TensorProto, numpy_helper

    found: Counter[str] = Counter()
    made = {node.output[0]: node.attribute[0].t for node in graph.node if _holds_tensor(node)}
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in constants:
            continue
        zero = node.input[2] if len(node.input) > 2 else ""
        tensor = stored.get(zero) or made.get(zero)
        if tensor is None:
            found["uint8"] += 1
            continue
        kind = TensorProto.DataType.Name(tensor.data_type).lower()
        symmetric = kind == "int8" and not numpy_helper.to_array(tensor).any()
        found["int8 symmetric" if symmetric else kind] += 1
    return dict(sorted(found.items()))


def _holds_tensor(node: "NodeProto") -> bool:
    return node.op_type == "Constant" and bool(node.attribute) and node.attribute[0].name == "value"


def _copies(graph: "GraphProto") -> list[str]:
    """Names of tensors whose bytes are stored under another name already."""
    seen: set[tuple[int, tuple[int, ...], str]] = set()
    copies = []
    for tensor in graph.initializer:
        if len(tensor.raw_data) < SMALLEST_COPY:
            continue
        key = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(tensor.raw_data).hexdigest())
        if key in seen and any(tensor.raw_data):  # zeros say nothing: biases start so
            copies.append(tensor.name)
        seen.add(key)
    return copies


def _elements(tensor: "TensorProto") -> int:
    result = 1
    for size in tensor.dims:
        result *= size
    return result


def _bytes(tensor: "TensorProto") -> int:
    return len(tensor.raw_data) or tensor.ByteSize()


def _is_float(tensor: "TensorProto") -> bool:
    from onnx import TensorProto

    return tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


def _is_wide(tensor: "TensorProto") -> bool:
    from onnx import TensorProto, numpy_helper

    if tensor.data_type != TensorProto.INT8:
        return False
    return bool(np.abs(numpy_helper.to_array(tensor).astype(np.int16)).max(initial=0) > 64)
