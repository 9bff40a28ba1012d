"""Where INT8 goes: symmetric fake-quantizers on the operations both TensorRT and ONNX Runtime run in INT8.

One placement serves both runtimes: every zero point is 0 (TensorRT refuses others), activations have one
scale per tensor and weights one per output channel. Outputs of convolutions and both inputs of residual
additions carry a quantizer, because ONNX Runtime runs a convolution as an integer kernel only between two.
Batch norm after a convolution counts as part of it: it is folded into the weights at conversion
(Jacob et al. 2018, arXiv:1712.05877; Wu et al. 2020, arXiv:2004.09602).
"""

import difflib
from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from compression.errors import CompressionError
from compression.quantize.folding import batch_norm
from compression.quantize.learned_steps import LearnedFakeQuantize
from compression.quantize.number_format import INT8, NumberFormat
from compression.quantize.rounding import SymmetricFakeQuantize

_ATEN = torch.ops.aten
CONVOLUTIONS = frozenset({_ATEN.conv1d.default, _ATEN.conv2d.default})
RELUS = frozenset({_ATEN.relu.default, _ATEN.relu_.default, _ATEN.hardtanh.default, _ATEN.hardtanh_.default})
LINEARS = frozenset({_ATEN.linear.default})
ADDITIONS = frozenset({_ATEN.add.Tensor, _ATEN.add_.Tensor})
MEANS = frozenset({_ATEN.adaptive_avg_pool2d.default, _ATEN.avg_pool2d.default, _ATEN.mean.dim})
MAXIMA = frozenset({_ATEN.max_pool2d.default})
JOINS = frozenset({_ATEN.cat.default})

SMALLEST_SCALE = 2.0**-20
"""Floor of every scale, far under real ranges: a dead channel must not give a scale of 0."""


class SymmetricInt8(Quantizer):
    """Annotates an exported graph for symmetric INT8; see the module's text for the placement.

    Tokens (three dimensions, as in transformers) keep a float residual stream: layer norm and attention
    read it in float, so quantizing it would only cost accuracy. Their linear layers are INT8.
    """

    def __init__(self, number_format: NumberFormat = INT8) -> None:
        """Set the number formats; weights of b bits use -(2^(b-1) - 1) to 2^(b-1) - 1, so that signs can change.

        With 7 bits, -63..63, products with activations fit into 16 bits.
        """
        self.keep_float = number_format.keep_float
        quantizer = LearnedFakeQuantize if number_format.learned_steps else SymmetricFakeQuantize
        self.activation = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-128,  # as ONNX saturates
            quant_max=127,
            qscheme=torch.per_tensor_symmetric,
            observer_or_fake_quant_ctr=quantizer.with_args(
                observer=MovingAverageMinMaxObserver,
                averaging_constant=number_format.averaging,
                eps=SMALLEST_SCALE,
                follows=number_format.calibration == "min_max",
            ),
        )
        limit = 2 ** (number_format.weight_bits - 1) - 1
        self.weight = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-limit,
            quant_max=limit,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=quantizer.with_args(
                # The range of the weights as they are now, not as they were.
                observer=MovingAveragePerChannelMinMaxObserver,
                averaging_constant=1.0,
                eps=SMALLEST_SCALE,
            ),
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate every node of ``model`` that the placement covers; returns the same module.

        Raises:
            CompressionError: ``keep_float`` names a layer that isn't there.
        """
        self._check_names(layer_names(model))
        for node in model.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in CONVOLUTIONS:
                self._annotate_convolution(node)
            elif node.target in LINEARS:
                self._annotate_weighted(node)
            elif node.target in ADDITIONS:
                self._annotate_addition(node)
            elif node.target in MEANS | MAXIMA | JOINS and _dimensions(node.all_input_nodes[0]) == 4:
                _annotate(node, {source: self._activation_for(source) for source in node.all_input_nodes})
        return model

    def validate(self, model: GraphModule) -> None:
        """Accept a graph in which something was annotated.

        Raises:
            CompressionError: no operation can be quantized.
        """
        if not any(Q_ANNOTATION_KEY in node.meta for node in model.graph.nodes):
            raise CompressionError(
                "Model 'to quantize' has no convolution or linear layer, expected at least one."
                " Leave the quantize stage out for it."
            )

    def _annotate_convolution(self, node: Node) -> None:
        if not self._annotate_weighted(node):
            return
        last = node
        for targets in ({batch_norm}, RELUS):
            follower = _only_user(last)
            if follower is not None and follower.target in targets:
                last = follower
        if not _is_output(last):
            _annotate(last, {}, output=self.activation)

    def _annotate_weighted(self, node: Node) -> bool:
        """Annotate input and weight; False for a weight that is computed, which stays float."""
        images, weight = node.all_input_nodes[:2]
        if weight.op != "get_attr" or self._stays_float(layer_name(weight)):
            return False
        _annotate(node, {images: self._activation_for(images), weight: self.weight})
        return True

    def _stays_float(self, layer: str) -> bool:
        return any(fnmatchcase(layer, pattern) for pattern in self.keep_float)

    def _check_names(self, layers: list[str]) -> None:
        for pattern in self.keep_float:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                close = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.3) or layers[:3]
                raise CompressionError(
                    f"Layer '{pattern}' of keep_float has no match in the model, expected a name such as "
                    f"{', '.join(close)}. Correct the name, or use * for any text."
                )

    def _annotate_addition(self, node: Node) -> None:
        sides = node.all_input_nodes
        if len(sides) == 2 and all(side.op != "get_attr" and _dimensions(side) == 4 for side in sides):
            _annotate(node, {side: self._activation_for(side) for side in sides})

    def _activation_for(self, source: Node) -> QuantizationSpecBase:
        """The scale of a tensor: its own, or for a maximum, which makes no new values, its input's."""
        if source.target in MAXIMA and Q_ANNOTATION_KEY in source.meta:
            return SharedQuantizationSpec((source.all_input_nodes[0], source))
        return self.activation


def layer_name(weight: Node) -> str:
    """The layer's path in the student, from the node that reads its weight."""
    return str(weight.target).rpartition(".")[0]


def layer_names(model: GraphModule) -> list[str]:
    """Paths of the convolutions and linear layers of a captured graph, in the order they run."""
    weighted = (node for node in model.graph.nodes if node.target in CONVOLUTIONS | LINEARS)
    weights = (node.all_input_nodes[1] for node in weighted)
    return list(dict.fromkeys(layer_name(weight) for weight in weights if weight.op == "get_attr"))


def quantized_nodes(model: GraphModule) -> Iterator[Node]:
    """The annotated nodes of a graph, in order."""
    return (node for node in model.graph.nodes if Q_ANNOTATION_KEY in node.meta)


def _annotate(node: Node, inputs: dict[Node, QuantizationSpecBase], output: QuantizationSpecBase | None = None) -> None:
    annotation = node.meta.get(Q_ANNOTATION_KEY) or QuantizationAnnotation(_annotated=True)
    annotation.input_qspec_map.update(inputs)
    annotation.output_qspec = output or annotation.output_qspec
    node.meta[Q_ANNOTATION_KEY] = annotation


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _dimensions(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0
