"""Zeros in the stored weights of an ONNX graph: how many, in which pattern, and what could be made of them.

Nothing here is a time: ONNX Runtime multiplies zeros like other numbers. TensorRT may take a sparse kernel for a 2:4
weight when it is built with ``SPARSE_WEIGHTS``, on GPUs with sparse tensor cores, where it measures a gain.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.graph_editor import GraphEditor
from export.onnx_graph import load_graph

if TYPE_CHECKING:
    from onnx import NodeProto

GROUP, KEPT = 4, 2
INDEX_BITS = 2
"""To say which place of its group a kept value has."""

_PASSED = frozenset({"Identity", "Cast", "Transpose", "QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class WeightSparsity:
    """One stored weight of a convolution or matrix product."""

    name: str
    """Of the stored tensor."""
    operators: tuple[str, ...]
    """What reads it: ``Conv``, ``Gemm``, ``MatMul``."""
    count: int
    zeros: int
    """Values that stand for exactly 0, whatever the zero point."""
    bytes_per_value: int
    two_of_four: bool
    """At most two of every four consecutive inputs are not 0, and the inputs are a multiple of four."""

    @property
    def dense_bytes(self) -> int:
        """As stored in the file."""
        return self.count * self.bytes_per_value

    @property
    def compressed_bytes(self) -> int:
        """With two of every four values and a 2-bit index for each of them, where 2:4 holds; as it is elsewhere."""
        if not self.two_of_four:
            return self.dense_bytes
        kept = self.count * KEPT // GROUP
        return kept * self.bytes_per_value + (kept * INDEX_BITS + 7) // 8


@dataclass(frozen=True)
class SparsityInfo:
    """The weights of a graph together."""

    weights: tuple[WeightSparsity, ...]
    """In the order in which the graph reads them."""

    @property
    def share_of_zeros(self) -> float:
        """Of all weights of convolutions and matrix products, 0..1."""
        return sum(each.zeros for each in self.weights) / max(1, sum(each.count for each in self.weights))

    @property
    def tensorrt_eligible(self) -> int:
        """How many weights are 2:4 along the inputs, as TensorRT asks of what its sparse kernels read."""
        return sum(each.two_of_four for each in self.weights)

    @property
    def dense_bytes(self) -> int:
        """Of these weights as stored."""
        return sum(each.dense_bytes for each in self.weights)

    @property
    def compressed_bytes(self) -> int:
        """Of these weights if 2:4 ones were packed. Arithmetic: no file is written so."""
        return sum(each.compressed_bytes for each in self.weights)


def sparsity_of(path: Path) -> SparsityInfo:
    """Facts about the zeros of an ONNX graph, float or quantized; weights that are computed are left out.

    Inputs are what the operator sums over: dimension 1 of a Conv's weight, the rows of a matrix on the right. A weight
    that several operators read is 2:4 if it is so for each of them.

    Raises:
        ExportError: the file is missing or is no ONNX graph.
    """
    editor = GraphEditor(load_graph(path))
    found: dict[str, WeightSparsity] = {}
    for node in editor.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        for place in (1, 0) if node.op_type != "Conv" else (1,):
            name = _stored_name(editor, node.input[place])
            if name is None:
                continue
            values = _value(editor, node.input[place])
            if values.ndim < 2:
                continue
            two_of_four = _two_of_four(values, _input_axis(node, place, values.ndim))
            before = found.get(name)
            found[name] = WeightSparsity(
                name=name,
                operators=(*(before.operators if before else ()), node.op_type),
                count=values.size,
                zeros=int((values == 0).sum()),
                bytes_per_value=editor.required(name).dtype.itemsize,
                two_of_four=two_of_four and (before is None or before.two_of_four),
            )
    return SparsityInfo(tuple(found.values()))


def _stored_name(editor: GraphEditor, name: str) -> str | None:
    """The stored tensor behind an input, through what changes no zero; None for a computed one."""
    while editor.value(name) is None:
        maker = editor.makers.get(name)
        if maker is None or maker.op_type not in _PASSED:
            return None
        name = maker.input[0]
    return name


def _value(editor: GraphEditor, name: str) -> NDArray:
    """The value of an input with a stored tensor behind it, up to positive factors per channel; 0 is exactly 0."""
    stored = editor.value(name)
    if stored is not None:
        return stored
    maker = editor.makers[name]
    if maker.op_type == "DequantizeLinear" and (integers := editor.value(maker.input[0])) is not None:
        return integers.astype(np.int32) - _along(maker, _zero_point(editor, maker), integers.ndim)
    values = _value(editor, maker.input[0])
    if maker.op_type == "QuantizeLinear":
        return np.rint(values / _along(maker, editor.required(maker.input[1]), values.ndim))
    if maker.op_type == "Transpose":
        order = next((list(attribute.ints) for attribute in maker.attribute if attribute.name == "perm"), None)
        return values.transpose(order)
    return values


def _zero_point(editor: GraphEditor, node: "NodeProto") -> NDArray:
    return editor.required(node.input[2]).astype(np.int32) if len(node.input) > 2 else np.zeros((), np.int32)


def _along(node: "NodeProto", values: NDArray, dimensions: int) -> NDArray:
    """Values per channel, in the place of the channels."""
    if values.ndim == 0 or values.size == 1:
        return values.reshape(())
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1) % dimensions
    return values.reshape([-1 if place == axis else 1 for place in range(dimensions)])


def _input_axis(node: "NodeProto", place: int, dimensions: int) -> int:
    if node.op_type == "Conv":
        return 1
    flag = "transB" if place else "transA"
    turned = node.op_type == "Gemm" and any(each.name == flag and each.i for each in node.attribute)
    return dimensions - 1 if (place == 1) == turned else dimensions - 2


def _two_of_four(values: NDArray, axis: int) -> bool:
    inputs = values.shape[axis]
    if inputs % GROUP:
        return False
    groups = np.moveaxis(values != 0, axis, -1).reshape(-1, GROUP)
    return bool((groups.sum(axis=1) <= KEPT).all())
