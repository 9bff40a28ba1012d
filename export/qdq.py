"""Quantize/dequantize graphs: what must hold for TensorRT, and the same model for ONNX Runtime on a CPU.

The symmetric int8 form that TensorRT wants runs in float on a CPU: ONNX Runtime absorbs a ReLU only into a
quantizer whose zero point is the end of its range, and its fast kernels read uint8 activations on x86 and int8
ones on ARM. The rewrites change how integers are written, not what they mean.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from compression.errors import ExportError
from export.graph_editor import GraphEditor
from export.onnx_graph import GraphInfo, check_graph, load_graph, save_graph
from export.runtime import CpuFeatures, cpu_features

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LOGGER = logging.getLogger(__name__)

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

WeightForm = Literal["int8", "uint8"]

SIGNED_LOW, UNSIGNED_LOW, UNSIGNED_MIDDLE = -128, 0, 128
"""Integers that stand for 0: the low end of int8 and of uint8, and the middle of uint8."""


@dataclass(frozen=True)
class QdqSummary:
    """What the quantizers of a graph look like."""

    quantize: int
    dequantize: int
    activation_dtypes: dict[str, int] = field(default_factory=dict)
    """Number of activation quantizers per integer type."""
    weights: int = 0
    """Number of integer weights."""
    violations: tuple[str, ...] = ()
    """Why TensorRT would refuse the graph, or a CPU would run it in float; empty when neither holds."""


@dataclass(frozen=True)
class CpuGraph(GraphInfo):
    """The graph a rewrite for CPUs wrote, and what it changed."""

    non_negative: int
    """Activation quantizers that start at the low end of their integers now."""
    signed: int
    """Activation quantizers with 0 in the middle."""
    weights: WeightForm
    """How weights are written."""


def weight_form(cpu: CpuFeatures) -> WeightForm:
    """How weights are written for a CPU: uint8 where uint8 x int8 kernels can overflow (x86, no VNNI).

    Overflow is not a rounding error: with large activations and weights of one sign results were measured
    18 to 23 steps off. uint8 weights run on kernels that can't overflow; where VNNI is, those are slower
    and not needed. Weights trained with 7 bits are exact in either form.
    """
    return "uint8" if cpu.saturates else "int8"


def to_u8_activations(
    source: Path,
    target: Path,
    *,
    weights: WeightForm | None = None,
    fine: bool | None = None,
    metadata: Mapping[str, str] | None = None,
) -> CpuGraph:
    """Facts about the copy of ``source`` whose activations are uint8, for ONNX Runtime on x86 CPUs.

    Non-negative tensors get zero point 0, others 128; scales stay, so a signed tensor keeps its values bit
    for bit and a non-negative one loses only its clipping above the range. Weights that pass a Transpose
    are stored transposed. Means over the whole image stay as they are: ONNX Runtime's integer kernel for them took a
    quarter of a MobileNetV2's time, seven times what the float one takes.

    Args:
        source: A graph in symmetric form, see ``check_symmetric``.
        target: Where the copy goes.
        weights: See ``weight_form``; None asks it about this CPU.
        fine: Also stretch non-negative tensors over all 256 steps, which halves their step. None: only those behind
            a Clip with an upper bound (ReLU6), which the runtime absorbs only if no step lies above it; left in the
            graph it keeps the layers around it in float.
        metadata: Stored in the file; None keeps the source's. How integers are written is added.

    Raises:
        ExportError: the source isn't in symmetric form.
    """
    zeros = (np.uint8(UNSIGNED_LOW), np.uint8(UNSIGNED_MIDDLE))
    return _for_cpu(source, target, zeros, weights or weight_form(cpu_features()), fine=fine, metadata=metadata)


def to_s8_activations(
    source: Path, target: Path, *, fine: bool | None = None, metadata: Mapping[str, str] | None = None
) -> CpuGraph:
    """Facts about the copy of ``source`` with int8 activations that run as integers, for ONNX Runtime on ARM CPUs.

    Every integer is that of ``to_u8_activations`` less 128: non-negative tensors get zero point -128, others 0. With
    zero point 0 everywhere, as TensorRT has it, ONNX Runtime absorbs no ReLU and half the convolutions stay in float.
    Arguments and errors as there; weights are int8, since ARM's dot products sum in 32 bits.
    """
    return _for_cpu(source, target, (np.int8(SIGNED_LOW), np.int8(0)), "int8", fine=fine, metadata=metadata)


def _for_cpu(
    source: Path,
    target: Path,
    zeros: tuple[np.integer, np.integer],
    weights: WeightForm,
    *,
    fine: bool | None,
    metadata: Mapping[str, str] | None,
) -> CpuGraph:
    """The rewrite for both instruction sets; ``zeros`` are the zero points of non-negative and of other tensors."""
    check_symmetric(source)
    proto = load_graph(source)
    editor = GraphEditor(proto)
    _store_transposed(editor)
    _store_integer_biases(editor)
    _shield_float_layers(editor)
    counts = {True: 0, False: 0}
    for quantizer in [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]:
        if editor.value(quantizer.input[0]) is not None:
            continue
        positive = editor.non_negative(quantizer.input[0])
        counts[positive] += 1
        zero_point = editor.constant(np.asarray(zeros[0] if positive else zeros[1]), "zero_point")
        scale = quantizer.input[1]
        if positive and (fine or (fine is None and _is_capped(editor, quantizer.input[0]))):
            step = editor.required(scale)
            scale = editor.constant(np.asarray(step * np.float32(127.5 / 255), step.dtype), "scale")
        readers = [node for node in proto.graph.node if node.input and node.input[0] == quantizer.output[0]]
        for node in (quantizer, *(node for node in readers if node.op_type == "DequantizeLinear")):
            node.input[1], node.input[2] = scale, zero_point
    if weights == "uint8":
        store_weights_as_uint8(proto)
        editor.index()
    del proto.graph.value_info[:]
    editor.drop_unused()
    entries = {entry.key: entry.value for entry in proto.metadata_props} if metadata is None else metadata
    written = {"activations": zeros[0].dtype.name, "weights": weights}
    save_graph(proto, target, metadata={**entries, **written})
    info = check_graph(target)
    return CpuGraph(**vars(info), non_negative=counts[True], signed=counts[False], weights=weights)


def summarise(path: Path) -> QdqSummary:
    """What the quantizers of a graph look like, and what is wrong with them."""
    proto = load_graph(path)
    editor = GraphEditor(proto)
    dtypes: dict[str, int] = {}
    weights, violations = 0, []
    nodes = proto.graph.node
    for node in nodes:
        if node.op_type == "BatchNormalization":
            violations.append(f"'{node.name}' is a BatchNormalization, expected it folded")
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero_point = editor.value(node.input[2]) if len(node.input) > 2 else np.zeros((), np.uint8)
        stored = editor.value(node.input[0])
        if zero_point is None or editor.value(node.input[1]) is None:
            violations.append(f"'{node.name}' has a computed scale or zero point, expected constants")
            continue
        if zero_point.any() or zero_point.dtype != np.int8:
            violations.append(f"'{node.name}' has a {zero_point.dtype} zero point, expected int8 0")
        if node.op_type == "QuantizeLinear":
            if stored is None:
                dtypes[str(zero_point.dtype)] = dtypes.get(str(zero_point.dtype), 0) + 1
            else:
                violations.append(f"'{node.name}' quantizes a constant, expected it stored as int8")
        elif stored is not None:
            weights += 1
            if stored.dtype == np.int32:
                violations.append(f"'{node.name}' dequantizes an int32 bias, expected a float bias")
            elif stored.ndim > 1 and zero_point.size < _channels(editor, node):
                violations.append(f"'{node.name}' has one weight scale, expected one per channel")
    return QdqSummary(
        quantize=sum(node.op_type == "QuantizeLinear" for node in nodes),
        dequantize=sum(node.op_type == "DequantizeLinear" for node in nodes),
        activation_dtypes=dtypes,
        weights=weights,
        violations=tuple(violations),
    )


def check_symmetric(path: Path) -> QdqSummary:
    """The summary of a graph in the form TensorRT accepts.

    That is: int8 with zero point 0 everywhere, weights stored as int8 with a scale per channel, float
    biases, no batch norm left.

    Raises:
        ExportError: the graph isn't quantized, or breaks one of these; the first three are named.
    """
    summary = summarise(path)
    if not summary.weights:
        raise ExportError(
            f"Graph '{path.name}' has no integer weights, expected a quantized graph."
            " Quantize the model before exporting it."
        )
    if summary.violations:
        more = f" and {len(summary.violations) - 3} more" if len(summary.violations) > 3 else ""
        raise ExportError(
            f"Graph '{path.name}' has {'; '.join(summary.violations[:3])}{more}."
            " Export it from compression.quantize, or with the 'tensorrt' preset of export.ptq."
        )
    return summary


def _stored_weights(editor: GraphEditor) -> Iterator["NodeProto"]:
    """The DequantizeLinear nodes that read a stored int8 tensor."""
    for node in editor.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in editor.stored:
            yield node


def _channels(editor: GraphEditor, node: "NodeProto") -> int:
    """Output channels of a stored weight, 1 if its scale axis is unknown."""
    stored = editor.value(node.input[0])
    scale = editor.value(node.input[1])
    if stored is None or scale is None:
        return 1
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    consumers = {user.op_type for user in editor.users(node.output[0])}
    return stored.shape[axis] if consumers & (WEIGHTED | {"Transpose"}) else 1


def store_weights_as_uint8(proto: "ModelProto") -> None:
    """Write, in place, stored int8 weights as uint8 around 128: the same values."""
    from onnx import numpy_helper

    editor = GraphEditor(proto)
    readers = [node for node in _stored_weights(editor) if editor.required(node.input[0]).dtype == np.int8]
    for name in {node.input[0] for node in readers}:
        shifted = (editor.required(name).astype(np.int16) + 128).astype(np.uint8)
        editor.stored[name].CopyFrom(numpy_helper.from_array(shifted, name))
    for node in readers:
        shape = editor.required(node.input[1]).shape
        zero_point = editor.constant(np.full(shape, 128, np.uint8), "weight_zero_point")
        del node.input[2:]
        node.input.append(zero_point)


def _store_transposed(editor: GraphEditor) -> None:
    """Move a Transpose behind a stored weight into the stored matrix, so that the product sees its weight."""
    for node in list(_stored_weights(editor)):
        users = editor.users(node.output[0])
        stored = editor.required(node.input[0])
        if len(users) != 1 or users[0].op_type != "Transpose" or stored.ndim != 2:
            continue
        node.input[0] = editor.constant(np.ascontiguousarray(stored.T), "weight_transposed")
        for attribute in node.attribute:
            if attribute.name == "axis":
                attribute.i = 1 - attribute.i % 2
        node.output[0] = users[0].output[0]
        editor.graph.node.remove(users[0])
    editor.index()


def _store_integer_biases(editor: GraphEditor) -> None:
    """Write the bias of a Gemm as int32 in steps of input scale times weight scale.

    The runtime does so itself for convolutions; a Gemm with a float bias it leaves in float.
    """
    import onnx

    for position, gemm in reversed(list(enumerate(editor.graph.node))):
        if gemm.op_type != "Gemm" or len(gemm.input) < 3:
            continue
        sources = [editor.makers.get(name) for name in gemm.input[:2]]
        bias = editor.value(gemm.input[2])
        scales = [
            editor.value(source.input[1])
            for source in sources
            if source is not None and source.op_type == "DequantizeLinear"
        ]
        if bias is None or len(scales) < 2 or scales[0] is None or scales[1] is None:
            continue
        step = np.broadcast_to(scales[0] * scales[1], bias.shape).astype(np.float32)
        counts = np.clip(np.rint(bias / step), -(2**31) + 1, 2**31 - 129).astype(np.int32)
        names = [editor.constant(counts, "bias"), editor.constant(np.ascontiguousarray(step), "bias_scale")]
        output = f"{gemm.output[0]}_bias"
        node = onnx.helper.make_node("DequantizeLinear", names, [output], name=f"{gemm.name}_bias", axis=0)
        gemm.input[2] = output
        editor.graph.node.insert(position, node)
    editor.index()


def _is_capped(editor: GraphEditor, name: str) -> bool:
    """Whether a Clip with an upper bound makes this tensor."""
    maker = editor.makers.get(name)
    return maker is not None and maker.op_type == "Clip" and len(maker.input) > 2 and bool(maker.input[2])


def _shield_float_layers(editor: GraphEditor) -> None:
    """Keep layers with float weights in float, by a Clip without bounds before them, which changes no value.

    Between two quantizers ONNX Runtime (1.31) would round their weights too, with one scale for the whole tensor:
    coarser than the INT8 that they were taken out of.
    """
    import onnx

    for position, node in reversed(list(enumerate(editor.graph.node))):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or node.input[1] not in editor.stored:
            continue
        source = editor.makers.get(node.input[0])
        if source is None or source.op_type != "DequantizeLinear":
            continue
        shielded = f"{node.output[0]}_shielded"
        clip = onnx.helper.make_node("Clip", [node.input[0]], [shielded], name=f"{node.name}_shield")
        node.input[0] = shielded
        editor.graph.node.insert(position, clip)
    editor.index()
