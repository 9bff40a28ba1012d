"""Batch norm in a quantized graph: live while training, part of the convolution afterwards.

With one weight scale per output channel, rounding and batch norm commute: scaling a channel by a factor
scales its step by the same factor and leaves its integers (a negative factor flips their sign). So the
training graph needs no simulated folding, which would cost two more passes over every activation, and
folding at the end changes no integer weight.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from compression.quantize.rounding import SymmetricFakeQuantize

_ATEN = torch.ops.aten
_FOLDABLE = frozenset({_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.linear.default})


def batch_norm(
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Batch norm as torch computes it, under a name that torchao's own folding doesn't look for.

    Torchao's folding resets epsilon and momentum to their defaults, and takes a minute per model.
    """
    return torch.batch_norm(values, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)


def hide_batch_norms(graph: GraphModule) -> GraphModule:
    """The same graph, in place, with ``batch_norm`` of this module for torch's."""
    for node in graph.graph.nodes:
        if node.target is _ATEN.batch_norm.default:
            node.target = batch_norm
    graph.recompile()
    return graph


def show_batch_norms(graph: GraphModule) -> list[str]:
    """Names of the batch norms that are left; in place they become torch's again, so that they export."""
    left = [node for node in graph.graph.nodes if node.target is batch_norm]
    for node in left:
        node.target = _ATEN.batch_norm.default
    graph.recompile()
    return [node.name for node in left]


@torch.no_grad()
def fold_batch_norms(graph: GraphModule) -> None:
    """Fold, in place, every batch norm whose input only it reads into the layer that makes this input."""
    for norm, layer in list(_foldable(graph)):
        arguments: list[Any] = list(norm.args)
        weight, bias, mean, var = (_value(graph, argument) for argument in arguments[1:5])
        eps = arguments[7]
        if mean is None or var is None:
            continue
        factor = torch.rsqrt(var + eps) * (1.0 if weight is None else weight)
        inner: list[Any] = list(layer.args)
        old_bias = _value(graph, inner[2]) if len(inner) > 2 else None
        shift = (0.0 if old_bias is None else old_bias) - mean
        new_bias = shift * factor + (0.0 if bias is None else bias)
        with graph.graph.inserting_before(layer):
            folded_weight = _scaled_weight(graph, inner[1], factor, layer.name)
            folded_bias = _parameter(graph, f"{layer.name}_folded_bias", new_bias)
        layer.args = (inner[0], folded_weight, folded_bias, *inner[3:])
        norm.replace_all_uses_with(layer)
        graph.graph.erase_node(norm)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


def _foldable(graph: GraphModule) -> Iterator[tuple[Node, Node]]:
    for node in graph.graph.nodes:
        if node.target is not batch_norm:
            continue
        layer = node.args[0]
        if isinstance(layer, Node) and layer.target in _FOLDABLE and len(layer.users) == 1:
            if layer.target is _ATEN.linear.default and layer.meta["val"].dim() != 2:
                continue  # batch norm works on dimension 1, the layer's outputs are the last
            yield node, layer


def _scaled_weight(graph: GraphModule, source: Any, factor: Tensor, name: str) -> Node:
    """The weight times ``factor`` per output channel, through a quantizer whose steps scale alike."""
    quantizer: SymmetricFakeQuantize | None = None
    weight_node = source
    if source.op == "call_module":
        quantizer = copy.deepcopy(graph.get_submodule(source.target))  # pyright: ignore[reportAssignmentType]
        weight_node = source.args[0]
    weight = _value(graph, weight_node)
    if weight is None:
        raise TypeError(f"Layer '{name}' has no stored weight, expected a parameter.")
    shape = [-1] + [1] * (weight.dim() - 1)
    folded = _parameter(graph, f"{name}_folded_weight", weight * factor.reshape(shape))
    if quantizer is None:
        return folded
    quantizer.rescale(factor)
    graph.add_submodule(f"{name}_folded_quantizer", quantizer)
    return graph.graph.call_module(f"{name}_folded_quantizer", (folded,))


def _parameter(graph: GraphModule, name: str, value: Tensor) -> Node:
    graph.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=False))
    node = graph.graph.get_attr(name)
    node.meta["val"] = value
    return node


def _value(graph: GraphModule, node: object) -> Tensor | None:
    """The stored tensor a node reads, None for no node."""
    if not isinstance(node, Node):
        return None
    path, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(path), name)
