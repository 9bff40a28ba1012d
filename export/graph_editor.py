"""Look-ups and small edits in an ONNX graph."""

from typing import TYPE_CHECKING

from numpy.typing import NDArray

from compression.errors import ExportError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

NON_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax"})
"""Operators whose results are never below 0."""
SIGN_KEEPING = frozenset(
    {"MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Reshape", "Flatten", "Transpose"}
    | {"Squeeze", "Unsqueeze", "Identity", "QuantizeLinear", "DequantizeLinear", "Slice", "Gather"}
)
"""Operators whose results are non-negative when their first input is."""


class GraphEditor:
    """Look-ups in a graph: who makes a tensor, and what its constant value is."""

    def __init__(self, proto: "ModelProto") -> None:
        self.graph: GraphProto = proto.graph
        self.index()
        self._signs: dict[str, bool] = {}

    def index(self) -> None:
        """Read the graph again after nodes were added or removed."""
        self.stored: dict[str, TensorProto] = {tensor.name: tensor for tensor in self.graph.initializer}
        self.makers: dict[str, NodeProto] = {name: node for node in self.graph.node for name in node.output}

    def value(self, name: str) -> NDArray | None:
        """The value of a stored tensor or Constant node, None for a computed tensor."""
        from onnx import numpy_helper

        if name in self.stored:
            return numpy_helper.to_array(self.stored[name])
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Constant" and maker.attribute[0].name == "value":
            return numpy_helper.to_array(maker.attribute[0].t)
        return None

    def required(self, name: str) -> NDArray:
        """The value of a stored tensor.

        Raises:
            ExportError: the tensor is computed.
        """
        value = self.value(name)
        if value is None:
            raise ExportError(f"Tensor '{name}' has a computed value, expected a stored one. Export the graph again.")
        return value

    def constant(self, value: NDArray, stem: str) -> str:
        """The name of a new stored tensor."""
        from onnx import numpy_helper

        number = len(self.stored)
        while (name := f"{stem}_{number}") in self.stored or name in self.makers:
            number += 1
        tensor = numpy_helper.from_array(value, name)
        self.graph.initializer.append(tensor)
        self.stored[name] = self.graph.initializer[-1]
        return name

    def non_negative(self, name: str) -> bool:
        """Whether a tensor can't hold values below 0; False when unknown."""
        if name not in self._signs:
            self._signs[name] = False  # for the way down; graphs have no cycles
            self._signs[name] = self._is_non_negative(name)
        return self._signs[name]

    def _is_non_negative(self, name: str) -> bool:
        maker = self.makers.get(name)
        if maker is None:
            return False
        if maker.op_type in NON_NEGATIVE:
            return True
        if maker.op_type == "Clip":
            low = self.value(maker.input[1]) if len(maker.input) > 1 and maker.input[1] else None
            return low is not None and float(low) >= 0
        if maker.op_type in SIGN_KEEPING:
            return self.non_negative(maker.input[0])
        if maker.op_type in ("Concat", "Add", "Mul"):
            return all(self.non_negative(source) for source in maker.input)
        return False

    def users(self, name: str) -> list["NodeProto"]:
        """The nodes that read a tensor."""
        return [node for node in self.graph.node if name in node.input]

    def drop_unused(self) -> None:
        """Remove stored tensors and Constant nodes that nothing reads."""
        read = {name for node in self.graph.node for name in node.input}
        for node in [n for n in self.graph.node if n.op_type == "Constant" and n.output[0] not in read]:
            self.graph.node.remove(node)
        kept = [tensor for tensor in self.graph.initializer if tensor.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        self.index()
