"""bfloat16: the eight exponent bits of float32 with seven of mantissa.

Nothing overflows that float32 holds, where float16 would, at the price of a relative step of 2^-7 (Kalamkar et al.
2019, arXiv:1905.12322). The graph is edited rather than exported from a bfloat16 model: torch's
exporter folds batch norms into float32 weights there, and the result is no valid graph.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from compression.errors import ExportError
from export.formats.opset import with_opset
from export.onnx_graph import GraphInfo, check_graph, load_graph, save_graph

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

OPSET = 22
"""The first in which convolutions and pools take bfloat16."""
_STAYS_FLOAT = {"Resize": (1, 2), "QuantizeLinear": (1, 2), "DequantizeLinear": (0, 1, 2)}
"""Inputs that the standard keeps in float32: sizes of a Resize, scales of quantizers."""


def to_bfloat16(source: Path, target: Path, *, metadata: Mapping[str, str] | None = None) -> GraphInfo:
    """Facts about the copy of a float32 graph that computes in bfloat16 between float32 inputs and outputs.

    Weights are rounded to nearest, ties to even. Needs GPUs from Ampere (SM80) on; ONNX Runtime doesn't run it on a
    CPU, so its parity is that of the torch model in bfloat16.

    Args:
        source: A float32 graph.
        target: Where the copy goes, in opset 22 or newer.
        metadata: Stored in the file; None keeps the source's.

    Raises:
        ExportError: the source is quantized, holds other floats, or an operator takes no bfloat16.
    """
    proto = with_opset(load_graph(source), OPSET)
    _check_source(proto, source.name)
    _round_constants(proto)
    _cast_ends(proto.graph)
    del proto.graph.value_info[:]
    save_graph(proto, target, metadata=metadata)
    try:
        return check_graph(target)
    except ExportError:
        target.unlink()
        raise


def bfloat16_predict(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from normalised images [N, C, H, W] float32 to logits [N, classes] float32, in torch's bfloat16.

    What a device with bfloat16 would answer, as far as it can be had on a CPU; the model is copied, not changed.
    """
    rounded = copy.deepcopy(model).bfloat16().eval()

    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return rounded(images.bfloat16()).float()

    return predict


def _check_source(proto: "ModelProto", name: str) -> None:
    from onnx import TensorProto

    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node)
    if quantized or kinds & {TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}:
        raise ExportError(
            f"Graph '{name}' has quantizers or other floats than float32, expected a float32 graph."
            " Give the float32 file of the model."
        )


def _round_constants(proto: "ModelProto") -> None:
    """Write, in place, every float32 constant as bfloat16, and every Cast to float32 as one to bfloat16."""
    from onnx import TensorProto

    graph = proto.graph
    kept = {
        node.input[place]
        for node in graph.node
        for place in _STAYS_FLOAT.get(node.op_type, ())
        if place < len(node.input)
    }
    for name, tensor in _constants(graph):
        if tensor.data_type == TensorProto.FLOAT and name not in kept:
            tensor.CopyFrom(_rounded(tensor))
    for node in graph.node:
        if node.op_type == "Cast":
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = TensorProto.BFLOAT16


def _constants(graph: "GraphProto") -> Iterator[tuple[str, "TensorProto"]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if node.op_type in ("Constant", "ConstantOfShape"):
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], attribute.t


def _rounded(tensor: "TensorProto") -> "TensorProto":
    import ml_dtypes
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    return numpy_helper.from_array(np.asarray(values.astype(ml_dtypes.bfloat16)), tensor.name)


def _cast_ends(graph: "GraphProto") -> None:
    """Float32 images in, float32 logits out, bfloat16 between."""
    from onnx import TensorProto, helper

    stored = {tensor.name for tensor in graph.initializer}
    for given in [entry for entry in graph.input if entry.name not in stored]:
        if given.type.tensor_type.elem_type != TensorProto.FLOAT:
            continue
        inner = f"{given.name}_bfloat16"
        for node in graph.node:
            for place, name in enumerate(node.input):
                if name == given.name:
                    node.input[place] = inner
        cast = helper.make_node("Cast", [given.name], [inner], name=f"{inner}/Cast", to=TensorProto.BFLOAT16)
        graph.node.insert(0, cast)
    for wanted in graph.output:
        if wanted.type.tensor_type.elem_type != TensorProto.FLOAT:
            continue
        inner = f"{wanted.name}_bfloat16"
        for node in graph.node:
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name == wanted.name:
                        names[place] = inner
        graph.node.append(helper.make_node("Cast", [inner], [wanted.name], name=f"{inner}/Cast", to=TensorProto.FLOAT))
