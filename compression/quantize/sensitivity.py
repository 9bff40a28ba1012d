"""What each layer costs when it alone is rounded, or alone loses half its channels.

The idea that layers differ, and that the difference should decide their precision, is of Dong et al. 2019 (HAWQ,
arXiv:1905.03696), who rank layers by the Hessian's largest eigenvalue. Here the outcome itself is measured, as Wu et
al. 2020 (arXiv:2004.09602, section on partial quantization) do: one layer is changed, the others compute in float.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.nn import functional as F

from compression.card import MethodCard
from compression.errors import CompressionError, ShapeError
from compression.quantize.annotator import CONVOLUTIONS, LINEARS, RELUS, SMALLEST_SCALE, layer_name
from compression.quantize.folding import batch_norm
from compression.quantize.number_format import INT8, NumberFormat
from compression.quantize.prepared import FakeQuantized, prepare_qat
from compression.types import Frozen

Format = Literal["int8 weights", "int8 activations", "int8", "4-bit weights", "half the channels"]
FORMATS: tuple[Format, ...] = ("int8 weights", "int8 activations", "int8", "4-bit weights", "half the channels")

KEPT_BYTES = 2**28
"""Values of the float run that are held at once, so that a change recomputes only what comes after it."""
MOST_IMAGES_AT_ONCE = 32
FEW_BITS = 4

Change = Callable[[Tensor], Tensor]


class LayerSensitivity(Frozen):
    """One layer in one format, all others in float."""

    layer: str
    """Module path of the convolution or linear layer."""
    format: Format
    kl: float
    """Mean KL(float || changed) of the predicted distributions, in nats."""
    flips: float
    """Share of images whose predicted class changed."""
    accuracy_drop: float
    """Accuracy of the float model less that of the changed one, a share; negative for a gain."""


class Sensitivity(Frozen):
    """The table of a model: layers in the order they run, times formats."""

    rows: tuple[LayerSensitivity, ...]
    num_samples: int
    """Images behind each row."""
    accuracy: float
    """Of the float model on them."""

    def column(self, format: Format = "int8") -> dict[str, LayerSensitivity]:
        """The row of each layer in one format, in the order they run."""
        return {row.layer: row for row in self.rows if row.format == format}

    @property
    def layers(self) -> list[str]:
        """Every layer, in the order they run."""
        return list(dict.fromkeys(row.layer for row in self.rows))

    def worst(self, format: Format = "int8") -> list[str]:
        """Layers by KL, the most sensitive first; equal ones in the order they run.

        Raises:
            CompressionError: the table was made without that format.
        """
        column = self.column(format)
        if not column:
            have = ", ".join(dict.fromkeys(row.format for row in self.rows)) or "none"
            raise CompressionError(
                f"Sensitivity table '{format}' has no rows, expected some (formats measured: {have}). Add it to the "
                "formats of the sensitivity stage."
            )
        return sorted(column, key=lambda layer: -column[layer].kl)


class SensitivityConfig(Frozen):
    """How closely the layers of a model are looked at."""

    kind: Literal["layerwise"] = "layerwise"
    images: PositiveInt = 512
    """At most this many validation images; as many of the calibration split set the ranges."""
    formats: tuple[Format, ...] = Field(default=FORMATS, min_length=1)
    """Columns of the table. Accuracy control reads ``int8``, pruning by sensitivity ``half the channels``."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Layer-by-layer sensitivity",
        paper="Dong et al. 2019 (HAWQ), arXiv:1905.03696, for the idea; Wu et al. 2020, arXiv:2004.09602, partial "
        "quantization",
        summary="Changes one layer at a time, to INT8, to 4-bit weights, or to half its channels, and measures how "
        "far the predictions move from the float model's.",
        needs="A trained model, calibration images, and labelled images.",
        cost="A third of a forward pass of the images for each layer and format (measured, 22 layers): what comes "
        "before a layer is computed once. Kept for every run with the same model and data.",
        evidence="Measured in every run. On digits a residual net's stem loses 3.3 nats with half its channels and its "
        "last block 0.02.",
    )

    @field_validator("formats")
    @classmethod
    def _once(cls, formats: tuple[Format, ...]) -> tuple[Format, ...]:
        return tuple(dict.fromkeys(formats))


def sensitivity(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    images: Tensor,
    labels: Tensor,
    number_format: NumberFormat = INT8,
    *,
    calibration: Tensor,
    formats: Sequence[Format] = FORMATS,
    on_step: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measure every layer of a float model by itself; the model stays as it is.

    A layer in INT8 has its weights, its input and its output rounded. What is rounded between layers (sums, means)
    counts with the layer that ran last before it, so that all layers together are the INT8 model. A layer that loses
    half its channels has those of smaller norm (batch norm folded in) at zero after its activation, which is what
    the next layer sees of a pruned one; the layer that gives the logits has no such row, since classes aren't pruned.

    Args:
        model: The float model.
        input_shape: Channels, height, width.
        images: Normalised images [N, C, H, W] to measure on.
        labels: Their classes [N], int64.
        number_format: What INT8 is; its ``keep_float`` is left aside, since every layer is to be measured.
        calibration: Normalised images [M, C, H, W] that set the ranges.
        formats: Columns of the table.
        on_step: Called with (done, total) after each layer of each batch.

    Raises:
        ShapeError: images and labels don't fit together, or there are none.
        CompressionError: the model can't be captured, has nothing to quantize, or gives logits that aren't finite.
    """
    if not len(images) or len(images) != len(labels) or not len(calibration):
        raise ShapeError(
            f"Images, labels and calibration images have {len(images)}, {len(labels)} and {len(calibration)} samples, "
            "expected as many labels as images and at least one of each. Pass images with their labels."
        )
    whole = number_format.model_copy(update={"keep_float": ()})
    return measured(
        Layerwise(prepare_qat(model, input_shape, calibration, whole)), images, labels, formats, on_step=on_step
    )


def measured(
    layerwise: "Layerwise",
    images: Tensor,
    labels: Tensor,
    formats: Sequence[Format],
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """The table of a prepared model, calibrated or trained; see :func:`sensitivity` for the arguments."""
    found: dict[tuple[str, Format], _Tally] = {
        (layer, format): _Tally() for layer in layerwise.layers for format in formats
    }
    reference = _Tally()
    chunks = list(zip(*(each.split(layerwise.batch_size(images)) for each in (images, labels)), strict=True))
    done, total = 0, len(chunks) * len(layerwise.layers)
    for chunk, truth in chunks:
        values = layerwise.float_values(chunk)
        base = layerwise.logits(values)
        reference.add(base, base, truth)
        for layer in layerwise.layers:
            for format in formats:
                changes = layerwise.changes(layer, format, values)
                if changes is None:
                    found.pop((layer, format), None)
                else:
                    found[layer, format].add(base, layerwise.logits(values, changes), truth)
            done += 1
            if on_step is not None:
                on_step(done, total)
    count = len(images)
    rows = [
        LayerSensitivity(
            layer=layer,
            format=format,
            kl=tally.kl / count,
            flips=tally.flips / count,
            accuracy_drop=(reference.correct - tally.correct) / count,
        )
        for (layer, format), tally in found.items()
    ]
    return Sensitivity(rows=tuple(rows), num_samples=count, accuracy=reference.correct / count)


@dataclass(frozen=True)
class _Layer:
    """Where a layer is in a prepared graph; a layer that runs twice has two of most."""

    weights: tuple[Node, ...]
    """Its weight quantizers."""
    activations: tuple[Node, ...]
    """Quantizers of its input, its output, and of what follows until the next layer."""
    ends: tuple[tuple[Node, Node], ...]
    """Each convolution or linear node, and the last node of its batch norm and ReLU."""


class Layerwise:
    """A prepared model in eval mode whose quantizers are switched on one layer at a time; nothing in it is changed.

    The graph runs node by node. Values of the float run are kept, and a change recomputes what depends on it.
    """

    def __init__(self, prepared: FakeQuantized) -> None:
        """Look at a model that :func:`compression.quantize.prepare_qat` made.

        Raises:
            CompressionError: it is in train mode, in which ranges move.
        """
        if prepared.training:
            raise CompressionError(
                "Model 'prepared' has train mode, expected eval mode, in which no range moves. Call eval() first."
            )
        graph = prepared.body
        ours = {id(module) for module in prepared.quantizers()}
        modules = {
            node: graph.get_submodule(str(node.target)) for node in graph.graph.nodes if node.op == "call_module"
        }
        self._quantizers = {node: module for node, module in modules.items() if id(module) in ours}
        self._layers = _find_layers(list(graph.graph.nodes), self._quantizers)
        self._interpreter = Interpreter(graph, garbage_collect_values=False)
        self._input = next(node for node in graph.graph.nodes if node.op == "placeholder")
        self._nodes = [
            node for node in graph.graph.nodes if node.op == "output" or (node.users and node is not self._input)
        ]
        self._in_place = any(_writes(node) for node in self._nodes)

    @property
    def layers(self) -> list[str]:
        """Module paths of the convolutions and linear layers, in the order they run."""
        return list(self._layers)

    def is_rounded(self, layer: str) -> bool:
        """Whether the layer has integer weights."""
        return bool(self._layers[layer].weights)

    def batch_size(self, images: Tensor) -> int:
        """How many images may run at once, so that the values fit into ``KEPT_BYTES``."""
        few = images[:2]
        values = self.float_values(few)
        of_images = (value for node, value in values.items() if node.op != "get_attr" and isinstance(value, Tensor))
        each = sum(value.numel() * value.element_size() for value in of_images) / len(few)
        return max(1, min(MOST_IMAGES_AT_ONCE, int(KEPT_BYTES // each)))

    def float_values(self, images: Tensor) -> dict[Node, Any]:
        """What each node gives for normalised images [N, C, H, W] when nothing is rounded."""
        device = next(self._interpreter.module.parameters()).device
        return self._run({self._input: images.to(device)}, {})

    def logits(self, values: Mapping[Node, Any], changes: Mapping[Node, Change] | None = None) -> Tensor:
        """Logits [N, classes] under ``changes`` of what nodes give, from the values of the float run."""
        if self._in_place:  # an operation has written over what is kept
            values = {self._input: values[self._input]}
        given = self._run(values, changes or {})[self._nodes[-1]]
        return given[0] if isinstance(given, tuple | list) else given

    def changes(self, layer: str, format: Format, values: Mapping[Node, Any]) -> dict[Node, Change] | None:
        """What a layer in that format changes; None where there is no such thing.

        Args:
            layer: One of ``layers``.
            format: Of the layer.
            values: Of the float run, for the stored weights.
        """
        found = self._layers[layer]
        weights: dict[Node, Change] = {node: self._quantizers[node] for node in found.weights}
        activations: dict[Node, Change] = {node: self._quantizers[node] for node in found.activations}
        match format:
            case "int8 weights":
                return weights
            case "int8 activations":
                return activations
            case "int8":
                return weights | activations
            case "4-bit weights":
                return dict.fromkeys(found.weights, _few_bits)
            case "half the channels":
                if any(user.op == "output" for _, end in found.ends for user in end.users):
                    return None
                return {end: partial(_masked, *_larger_half(node, values)) for node, end in found.ends}

    @torch.no_grad()
    def _run(self, values: Mapping[Node, Any], changes: Mapping[Node, Change]) -> dict[Node, Any]:
        """All values, of which only those are computed that aren't there yet or depend on a change."""
        known, fresh = dict(values), set[Node]()
        self._interpreter.env = known
        for node in self._nodes:
            if node in known and node not in changes and fresh.isdisjoint(node.all_input_nodes):
                continue
            value = known[node.all_input_nodes[0]] if node in self._quantizers else self._interpreter.run_node(node)
            known[node] = changes[node](value) if node in changes else value
            fresh.add(node)
        self._interpreter.env = {}
        return known


class _Tally:
    """Sums over images."""

    def __init__(self) -> None:
        self.kl = self.flips = self.correct = 0.0

    def add(self, base: Tensor, changed: Tensor, labels: Tensor) -> None:
        before, after = (logits.cpu().double().log_softmax(dim=1) for logits in (base, changed))
        if not bool(torch.isfinite(before).all() and torch.isfinite(after).all()):
            raise CompressionError(
                "Model 'to measure' has logits that are not finite, expected finite numbers. It diverged or "
                "overflowed: lower the learning rate, or leave the sensitivity stage out."
            )
        self.kl += float(F.kl_div(after, before, reduction="none", log_target=True).sum(dim=1).clamp(min=0.0).sum())
        predicted = after.argmax(dim=1)
        self.flips += float((predicted != before.argmax(dim=1)).sum())
        self.correct += float((predicted == labels.cpu()).sum())


def _find_layers(nodes: Sequence[Node], quantizers: Mapping[Node, nn.Module]) -> dict[str, _Layer]:
    """The layers of a prepared graph in the order they run, with every quantizer among them."""
    weights, activations, ends = ({} for _ in range(3))  # by layer, each a list without doubles
    first, taken, layer = None, set[Node](), None
    for node, name in _weighted(nodes, quantizers):
        first = first or name
        source, weight = node.all_input_nodes[:2]
        end = _end_of(node)
        follower = next(iter(end.users)) if len(end.users) == 1 else end
        rounds = [each for each in (source, follower) if each in quantizers]
        weights.setdefault(name, {}).update(dict.fromkeys([weight] if weight in quantizers else []))
        activations.setdefault(name, {}).update(dict.fromkeys(rounds))
        ends.setdefault(name, []).append((node, end))
        taken |= {weight, *rounds}
    at = {node: name for name, found in ends.items() for node, _ in found}
    for node in nodes:
        layer = at.get(node, layer)
        if node in quantizers and node not in taken and (owner := layer or first) is not None:
            activations[owner][node] = None
    return {name: _Layer(tuple(weights[name]), tuple(activations[name]), tuple(ends[name])) for name in ends}


def _weighted(nodes: Sequence[Node], quantizers: Mapping[Node, nn.Module]) -> Iterator[tuple[Node, str]]:
    """Convolutions and linear nodes with a stored weight, and the names of their layers."""
    for node in nodes:
        if node.target in CONVOLUTIONS | LINEARS:
            weight = node.all_input_nodes[1]
            stored = weight.all_input_nodes[0] if weight in quantizers else weight
            if stored.op == "get_attr":
                yield node, layer_name(stored)


def _end_of(node: Node) -> Node:
    """The node itself, or the batch norm or ReLU after it that alone reads it."""
    for targets in ({batch_norm}, RELUS):
        users = list(node.users)
        if len(users) == 1 and users[0].target in targets:
            node = users[0]
    return node


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _few_bits(weight: Tensor) -> Tensor:
    """A weight [out, ...] at ``FEW_BITS`` bits, one symmetric scale per output channel, from its extremes."""
    limit = 2 ** (FEW_BITS - 1) - 1
    largest = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)
    scale = (largest / limit).clamp(min=SMALLEST_SCALE)
    return (weight * (1.0 / scale)).round().clamp(-limit, limit) * scale


def _larger_half(node: Node, values: Mapping[Node, Any]) -> tuple[Tensor, int]:
    """1 for the output channels that stay and 0 for the half of smaller norm, and their dimension in the output."""
    weight: Tensor = values[node.all_input_nodes[1]]
    norms = weight.flatten(1).norm(dim=1)
    follower = next(iter(node.users))
    if follower.target is batch_norm:
        scale, _, _, variance = (values.get(each) if isinstance(each, Node) else None for each in follower.args[1:5])
        norms = norms * (1.0 if scale is None else scale.abs())
        if variance is not None:
            norms = norms * torch.rsqrt(variance + float(str(follower.args[7])))
    keep = torch.ones_like(norms)
    keep[norms.argsort(stable=True)[: len(norms) // 2]] = 0.0
    return keep, 1 if node.target in CONVOLUTIONS else -1


def _masked(keep: Tensor, dimension: int, value: Tensor) -> Tensor:
    shape = [1] * value.dim()
    shape[dimension] = -1
    return value * keep.reshape(shape)
