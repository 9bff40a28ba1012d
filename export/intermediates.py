"""What a model computes between input and output, at points that every form of one model has.

A graph is cut into segments: an operation that makes new values (a layer, an addition, a pooling, ...) and what
follows it alone, one after the other: batch norm, bias, activation, rounding. The value behind a segment is a point.
So a convolution, its folded form and its integer form have the same point: what the next layer reads.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from compression.errors import ExportError

Inputs = Sequence[NDArray]
"""One array per input of the model, samples first."""

LAYER = "layer"
FOLLOWER = "following"
"""Batch norm, activations, fake-quantizers, casts."""
FOLLOWING = frozenset({FOLLOWER, "reshape", "quantize", "dequantize"})
"""What continues a segment, beside additions and products with constants."""
WITH_CONSTANT = frozenset({"Add", "Sub", "Mul"})
MOVING = "moving"
"""Operations that only move values; they neither begin nor continue a segment."""
SIZE = "size"
"""Operations that read the shape of a tensor, not its values."""
RESHAPE = "reshape"
"""The same values in the same order in another shape: continues a segment."""


@dataclass(frozen=True)
class Operation:
    """One node of a graph, in words that torch and ONNX share."""

    output: str
    """Name of the tensor it makes."""
    sources: tuple[str, ...]
    """Tensors it reads that depend on the model's input."""
    family: str
    """``layer``, one of ``FOLLOWING``, ``moving``, or the operator's ONNX name."""
    place: str
    """Path of the layer or module it belongs to; empty if unknown or the whole model."""
    name: str = ""
    """Name of the node, where the place is unknown."""


@dataclass(frozen=True)
class Point:
    """The value behind a segment."""

    name: str
    """Path of the layer; for other operations ``<module path>/<operator>``."""
    tensor: str
    """Where the value is."""
    made: str
    """The tensor the segment's first operation makes."""
    is_layer: bool
    """Whether the segment begins with a convolution or linear layer."""
    sources: tuple[str, ...]
    """Points it reads."""
    integers: str | None = None
    """The last tensor of integers in the segment, if any."""


@dataclass
class Values:
    """What a form computed for some inputs."""

    at: dict[str, NDArray]
    """Point name -> values, samples first."""
    outputs: list[NDArray]
    """The model's outputs."""
    optimised: list[NDArray] | None = None
    """The outputs of the file as the runtime optimises it; none for a torch form."""
    clipped: dict[str, float] = field(default_factory=dict)
    """Point name -> share of its integers at the end of their range, where values were cut off."""


class Form(Protocol):
    """One form of a model whose intermediate values can be looked at."""

    name: str
    points: tuple[Point, ...]
    paths: bool
    """Whether points are named by module paths, as our own files' and torch's are."""

    def run(self, inputs: Inputs) -> Values:
        """All points of one small batch."""
        ...


def points_of(operations: Sequence[Operation], inputs: Sequence[str], outputs: Sequence[str]) -> tuple[Point, ...]:
    """The points of a graph, in execution order; the model's inputs, as it rounds them, come first."""
    users: dict[str, list[Operation]] = {}
    makers = {operation.output: operation for operation in operations}
    for operation in operations:
        if operation.family == SIZE:
            continue
        for source in dict.fromkeys(operation.sources):
            users.setdefault(source, []).append(operation)
    points: list[Point] = []
    home: dict[str, str] = {}  # tensor -> its segment
    counts: Counter[str] = Counter()

    def above(tensor: str, seen: set[str]) -> Iterator[str]:
        if tensor in seen:
            return
        seen.add(tensor)
        if tensor in home:
            yield home[tensor]
        elif tensor in makers:
            for source in makers[tensor].sources:
                yield from above(source, seen)

    def add(start: str, stem: str, sources: Sequence[str], *, is_layer: bool) -> None:
        tensor, integers = start, None
        inside = [start]
        while tensor not in outputs and (follower := _follower(users.get(tensor, []), tensor)):
            tensor = follower.output
            integers = tensor if follower.family == "quantize" else integers
            inside.append(tensor)
            if len(users[inside[-2]]) > 1:
                break
        if tensor == integers and len(inside) > 1:  # never end on integers: their scale is not known here
            tensor = inside[-2]
        name = f"{stem}_{counts[stem]}" if counts[stem] else stem
        counts[stem] += 1
        read = tuple(dict.fromkeys(found for source in sources for found in above(source, set())))
        home.update(dict.fromkeys(inside, name))
        points.append(Point(name, tensor, start, is_layer, read, integers))

    for name in inputs:
        add(name, "input" if len(inputs) == 1 else f"input {name}", (), is_layer=False)
    for operation in operations:
        if operation.output in home or operation.family in FOLLOWING | {MOVING, SIZE} or not operation.sources:
            continue
        is_layer = operation.family == LAYER
        stem = operation.place if is_layer else f"{operation.place}/{operation.family}"
        if not operation.place and (is_layer or operation.name):
            stem = operation.name or operation.output
        add(operation.output, stem, operation.sources, is_layer=is_layer)
    return tuple(points)


def _follower(users: Sequence[Operation], tensor: str) -> Operation | None:
    """The operation that continues a segment: the only reader, or one of several equal dequantizers."""
    if not users or (len(users) > 1 and any(user.family != "dequantize" for user in users)):
        return None
    first = users[0]
    alone = first.sources == (tensor,)
    return first if alone and first.family in FOLLOWING | WITH_CONSTANT else None


_ATEN = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear", "conv_transpose2d"), LAYER),
    **dict.fromkeys(("batch_norm", "dropout", "clone", "contiguous", "to", "_to_copy", "detach"), FOLLOWER),
    **dict.fromkeys(("relu", "hardtanh", "relu6", "clamp", "clamp_min"), FOLLOWER),
    **dict.fromkeys(("view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten"), RESHAPE),
    **dict.fromkeys(
        ("permute", "transpose", "expand", "slice", "select", "getitem", "chunk", "split", "unbind"), MOVING
    ),
    **dict.fromkeys(("mean", "adaptive_avg_pool2d", "avg_pool2d", "adaptive_avg_pool1d"), "Pool"),
    **{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "cat": "Concat", "max_pool2d": "MaxPool"},
    **{"matmul": "MatMul", "bmm": "MatMul", "softmax": "Softmax", "layer_norm": "LayerNormalization", "gelu": "Gelu"},
    **{"quantize_per_tensor": "quantize", "quantize_per_channel": "quantize"},
    **{"dequantize_per_tensor": "dequantize", "dequantize_per_channel": "dequantize", "sigmoid": "Sigmoid"},
    **{"hardswish": "HardSwish", "hardsigmoid": "HardSigmoid", "tanh": "Tanh", "leaky_relu": "LeakyRelu"},
}


class TorchForm:
    """A torch module, a fake-quantized or a converted one, run node by node."""

    paths = True

    def __init__(self, module: nn.Module, input_shape: tuple[int, ...], name: str = "torch") -> None:
        """Capture ``module`` as a graph, unless it holds one; it stays as it is.

        Args:
            module: In its float, fake-quantized (``FakeQuantized``) or integer (``Quantized``) form.
            input_shape: Channels, height, width.
            name: For messages.

        Raises:
            ExportError: the module can't be captured.
        """
        self.name = name
        body = getattr(module, "body", None)
        self.graph = body if isinstance(body, GraphModule) else _captured(module, input_shape)
        nodes: list[Node] = list(self.graph.graph.nodes)
        constants: set[Node] = set()
        for node in nodes:
            # In order, so that what is made of constants alone (a rounded weight) is one too.
            if node.op != "placeholder" and all(source in constants for source in node.all_input_nodes):
                constants.add(node)
        operations = [
            _operation(self.graph, node, constants)
            for node in nodes
            if node.op in ("call_function", "call_module") and node not in constants and not _is_guard(node)
        ]
        inputs = [node.name for node in nodes if node.op == "placeholder"]
        outputs = [source.name for node in nodes if node.op == "output" for source in node.all_input_nodes]
        self.points = points_of(operations, inputs, outputs)
        self._limits = {node.name: _limits(node) for node in nodes if _family(node) == "quantize"}

    def run(self, inputs: Inputs) -> Values:
        """All points of one small batch, on the CPU or where the module is."""
        wanted = {point.tensor for point in self.points} | {point.integers for point in self.points}
        kept: dict[str, Tensor] = {}

        class Looking(Interpreter):
            def run_node(self, n: Node) -> Any:
                value = super().run_node(n)
                if n.name in wanted and isinstance(value, Tensor):
                    kept[n.name] = value.detach().cpu().clone()  # the next operation may work in place
                return value

        device = next((parameter.device for parameter in self.graph.parameters()), torch.device("cpu"))
        with torch.no_grad():
            output = Looking(self.graph).run(*(torch.as_tensor(each, device=device) for each in inputs))
        outputs = output if isinstance(output, list | tuple) else [output]
        return Values(
            at={point.name: kept[point.tensor].float().numpy() for point in self.points if point.tensor in kept},
            outputs=[each.detach().cpu().float().numpy() for each in outputs],
            clipped={
                point.name: share_at_limits(kept[point.integers].numpy(), *self._limits[point.integers])
                for point in self.points
                if point.integers in kept and point.integers in self._limits
            },
        )


def share_at_limits(integers: NDArray, low: int, high: int, zero_point: int) -> float:
    """Share of integers at the ends of their range; the low end doesn't count where it stands for zero."""
    clipped = np.count_nonzero(integers == high)
    if zero_point != low:
        clipped += np.count_nonzero(integers == low)
    return clipped / max(integers.size, 1)


def _captured(module: nn.Module, input_shape: tuple[int, ...]) -> GraphModule:
    source = copy.deepcopy(module).eval().cpu()
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        program = torch.export.export(source, (torch.zeros(2, *input_shape),), dynamic_shapes=shapes, strict=False)
        graph = program.module()
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"Model '{type(module).__name__}' has code torch.export can't capture ({first}), expected a static graph."
            " Compare its exported files with each other instead."
        ) from error
    if not isinstance(graph, GraphModule):  # pragma: no cover - another torch
        raise ExportError(
            f"Model '{type(module).__name__}' has no graph after its capture, expected one. Update torch."
        )
    return graph


def _operation(graph: GraphModule, node: Node, constants: set[Node]) -> Operation:
    sources = tuple(source.name for source in node.all_input_nodes if source not in constants)
    family = _family(node)
    place = _stack_path(node)
    if family == LAYER:
        weight = node.all_input_nodes[1] if len(node.all_input_nodes) > 1 else None
        if weight is None or weight not in constants:
            family = node.name
        else:
            place = _weight_path(weight) or place
    if family in WITH_CONSTANT and sources and len(node.args) > 1 and node.args[0] is node.args[1]:
        sources = (sources[0], sources[0])  # x + x reads no constant
    if family == RESHAPE:
        sources = sources[:1]  # the others are sizes
    return Operation(node.name, sources, family, place, "" if place or family in _ATEN.values() else node.name)


def _is_guard(node: Node) -> bool:
    return node.op == "call_module" and str(node.target).endswith("_guards_fn")


def _family(node: Node) -> str:
    if node.op == "call_module":
        return FOLLOWER
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    name = str(name).removesuffix("_") if name != "_" else "_"
    value = node.meta.get("val")
    if value is not None and not (isinstance(value, Tensor) and value.dim()):
        return SIZE if isinstance(value, torch.SymInt | int) else MOVING  # or tuples of tensors
    return _ATEN.get(name, name)


def _stack_path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def _weight_path(weight: Node) -> str:
    """Path of the layer whose weight this node gives, through what rounds it; empty if it was folded."""
    while weight.op != "get_attr":
        if not weight.all_input_nodes:
            return ""
        weight = weight.all_input_nodes[0]
    return str(weight.target).rpartition(".")[0]


def _limits(node: Node) -> tuple[int, int, int]:
    """Lowest and highest integer, and zero point, of a ``quantize_per_tensor``."""
    low, high = (int(value) for value in node.args[3:5])  # pyright: ignore[reportArgumentType]
    zero_point = node.args[2]
    return low, high, zero_point if isinstance(zero_point, int) else low - 1


def batches(inputs: Inputs, size: int) -> Iterator[list[NDArray]]:
    """The inputs in pieces of at most ``size`` samples."""
    for start in range(0, len(inputs[0]), size):
        yield [each[start : start + size] for each in inputs]


def by_name(values: Mapping[str, NDArray], names: Sequence[str]) -> list[NDArray]:
    """The arrays in the order of ``names``; in their own order where the names are others."""
    return [values[name] for name in names] if set(names) == set(values) else list(values.values())
