"""Accuracy control: layers go back to float, the most sensitive first, until INT8 is as good as it has to be."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from compression.card import MethodCard
from compression.data import Dataset
from compression.errors import CompressionError
from compression.metrics import predict
from compression.quantize.number_format import NumberFormat
from compression.quantize.prepared import FakeQuantized, convert, prepare_qat
from compression.quantize.rounding import SymmetricFakeQuantize
from compression.quantize.sensitivity import Layerwise
from compression.types import Frozen


class AccuracyControl(Frozen):
    """The largest accuracy that INT8 may cost, and how many layers may stay in float for it."""

    max_drop: Annotated[float, Field(ge=0.0, le=1.0)] = 0.005
    """Of the accuracy on the validation split, as a share: 0.005 is half a point."""
    max_layers: Annotated[int, Field(ge=0)] | None = 8
    """Most layers that are tried, the most sensitive ones, and so may go back to float; null for all of them. Each
    costs an evaluation and a capture of the graph."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Accuracy control",
        paper="Wu et al. 2020, arXiv:2004.09602, partial quantization",
        summary="Puts the most sensitive layers back to float, one at a time, until INT8 loses no more accuracy than "
        "allowed, then gives back to INT8 what turns out not to be needed.",
        needs="A quantized model, its float form, and labelled validation images; a sensitivity table for the order.",
        cost="Two evaluations on the validation split; another one and a capture of the graph for each layer tried.",
        evidence="Fashion-MNIST: put one to three layers back on three of four students; no accuracy changed beyond "
        "its interval, and on a MobileNetV2 eight did not suffice for a bound of 0.1 points. See docs/benchmarks.md.",
    )


class Attempt(Frozen):
    """One layer that was put back to float, or given back to INT8, on trial."""

    layer: str
    to: Literal["float", "int8"]
    drop_before: float
    """Accuracy of the float model less that of the INT8 model, a share of the validation split."""
    drop_after: float
    kept: bool


@dataclass(frozen=True)
class Reverted:
    """A model within its bound, or as near to it as layers in float bring it."""

    prepared: FakeQuantized
    """Weights, ranges and batch norm statistics as they were, trained or calibrated; in eval mode."""
    keep_float: tuple[str, ...]
    """Of the number format that ``prepared`` has now: what it had before, and the layers that went back."""
    drop: float
    """Accuracy of the float model less that of the INT8 model, a share of the validation split."""
    met: bool
    """Whether ``drop`` is within the bound."""
    rows: tuple[Attempt, ...]
    """What was tried, in order."""

    def record(self, control: AccuracyControl) -> dict[str, Any]:
        """Everything but the model, as JSON; the report's section on sensitivity reads it."""
        return {
            **control.model_dump(mode="json"),
            "keep_float": list(self.keep_float),
            "drop": self.drop,
            "met": self.met,
            "rows": [row.model_dump(mode="json") for row in self.rows],
        }


@dataclass(frozen=True, order=True)
class _Loss:
    """What INT8 costs; of equal drops, the smaller divergence is the better one."""

    drop: float
    divergence: float
    """Mean KL(float || INT8), nats."""


def revert_layers(
    prepared: FakeQuantized,
    model: nn.Module,
    dataset: Dataset,
    number_format: NumberFormat,
    control: AccuracyControl,
    *,
    order: Sequence[str],
    on_step: Callable[[int, int], None] | None = None,
) -> Reverted:
    """Put layers back to float until the INT8 model is within ``control``'s bound of the float model.

    While the drop is above the bound, the next layer of ``order`` goes back to float. It stays there if that lowers
    the drop, or leaves it and lowers the divergence from the float model: where two layers are broken, one alone may
    change no answer. Then each layer that went back is given back to INT8, the least sensitive first, and stays there
    if the bound still holds (where it doesn't, if the drop doesn't rise). Drops are of the converted model, which is
    what ships, on the same images as the float model's. At least one layer stays in INT8. Not meeting the bound is a
    result, no error.

    Args:
        prepared: The calibrated or trained model in eval mode; it stays as it is.
        model: The float model it was made of, and is compared with.
        dataset: Its validation split is measured on.
        number_format: Of ``prepared``; layers it keeps in float stay there.
        control: The bound.
        order: Layers to try, the most sensitive first, as :meth:`Sensitivity.worst` gives them.
        on_step: Called with (done, total) after each layer; total is the most layers that may be tried.

    Raises:
        CompressionError: ``order`` names a layer that isn't there, or ``prepared`` is in train mode.
    """
    layerwise = Layerwise(prepared)
    layers = _rounded_layers(layerwise, order)[: control.max_layers]
    validation, preprocessing = dataset.validation, dataset.preprocessing
    reference = predict(model, validation, preprocessing)

    def loss_of(candidate: FakeQuantized) -> _Loss:
        return _loss(reference, predict(convert(candidate), validation, preprocessing), validation.labels)

    def rebuilt(reverted: Sequence[str]) -> FakeQuantized:
        keep_float = (*number_format.keep_float, *reverted)
        fresh = prepare_qat(
            model, dataset.input_shape, None, number_format.model_copy(update={"keep_float": keep_float})
        )
        return carried_over(prepared, fresh)

    most = sum(map(layerwise.is_rounded, layerwise.layers)) - 1
    total = 2 * len(layers)
    best, loss = prepared, loss_of(prepared)
    reverted: list[str] = []
    rows: list[Attempt] = []
    losses = {frozenset[str](): loss}

    def attempt(layer: str, to: Literal["float", "int8"], wanted: list[str], good: Callable[[_Loss], bool]) -> None:
        nonlocal best, loss, reverted
        if (key := frozenset(wanted)) in losses and not good(losses[key]):
            return  # measured before, on the way here
        candidate = rebuilt(wanted) if wanted else prepared
        if key not in losses:
            losses[key] = loss_of(candidate)
        found = losses[key]
        kept = good(found)
        rows.append(Attempt(layer=layer, to=to, drop_before=loss.drop, drop_after=found.drop, kept=kept))
        if kept:
            best, loss, reverted = candidate, found, wanted
        if on_step is not None:
            on_step(len(rows), total)

    for layer in layers:
        if loss.drop <= control.max_drop or len(reverted) >= most:
            break
        before = loss
        attempt(layer, "float", [*reverted, layer], lambda found, before=before: found < before)
    for layer in reversed(reverted.copy()):
        bound = max(control.max_drop, loss.drop)
        attempt(layer, "int8", [each for each in reverted if each != layer], lambda found, b=bound: found.drop <= b)
    if best is prepared:
        best = copy.deepcopy(prepared)
    if on_step is not None:
        on_step(total, total)
    return Reverted(
        prepared=best,
        keep_float=(*number_format.keep_float, *reverted),
        drop=loss.drop,
        met=loss.drop <= control.max_drop,
        rows=tuple(rows),
    )


def carried_over(source: FakeQuantized, target: FakeQuantized) -> FakeQuantized:
    """``target``, in place, with all of ``source``'s state: weights, statistics, quantizers and mode.

    Both are prepared from one model, ``target`` with more layers in float. Quantizers are told apart by the tensor
    they round, since their names are numbers that change when one is left out.

    Raises:
        CompressionError: ``target`` rounds a tensor that ``source`` doesn't, or they are of different models.
    """
    have = {_rounded_tensor(node): str(node.target) for node in _quantizer_nodes(source.body)}
    wanted = {str(node.target): _rounded_tensor(node) for node in _quantizer_nodes(target.body)}
    if more := [tensor for tensor in wanted.values() if tensor not in have]:
        raise CompressionError(
            f"Model 'to carry over' has a quantizer for '{more[0]}', expected one of the tensors that the trained "
            "model rounds. Give it the number format it was trained with, and more layers in keep_float."
        )
    ours, theirs = (tuple(f"body.{place}." for place in places) for places in (have.values(), wanted))
    state = {name: value for name, value in source.state_dict().items() if not name.startswith(ours)}
    state |= {name: value for name, value in target.state_dict().items() if name.startswith(theirs)}
    try:
        target.load_state_dict(state)
    except RuntimeError as error:
        raise CompressionError(
            f"Model 'to carry over' has another structure ({str(error).splitlines()[-1].strip()}), expected that of "
            "the trained one. Pass the float model it was made of."
        ) from error
    # Copied, not loaded: loading sets the smallest scale of torchao's observers back to its default.
    memo: dict[int, object] = {}  # one quantizer may stand at several places
    for place, tensor in wanted.items():
        target.body.set_submodule(place, copy.deepcopy(source.body.get_submodule(have[tensor]), memo))
    return target.train(source.training)


def _rounded_layers(layerwise: Layerwise, order: Sequence[str]) -> list[str]:
    """The layers of ``order`` with integer weights, once each."""
    if unknown := [layer for layer in order if layer not in layerwise.layers]:
        raise CompressionError(
            f"Layer '{unknown[0]}' of the order has no match in the model, expected one of "
            f"{', '.join(layerwise.layers[:5])}, ... Measure the sensitivity of this model."
        )
    return [layer for layer in dict.fromkeys(order) if layerwise.is_rounded(layer)]


def _loss(reference: Tensor, found: Tensor, labels: Tensor) -> _Loss:
    right = [int((logits.argmax(dim=1) == labels).sum()) for logits in (reference, found)]
    before, after = (logits.double().log_softmax(dim=1) for logits in (reference, found))
    divergence = F.kl_div(after, before, reduction="batchmean", log_target=True)
    return _Loss(
        drop=(right[0] - right[1]) / len(labels), divergence=float(torch.nan_to_num(divergence, nan=torch.inf))
    )


def _quantizer_nodes(graph: GraphModule) -> list[Node]:
    modules: Mapping[str, nn.Module] = dict(graph.named_modules(remove_duplicate=False))
    calls = (node for node in graph.graph.nodes if node.op == "call_module")
    return [node for node in calls if isinstance(modules[str(node.target)], SymmetricFakeQuantize)]


def _rounded_tensor(node: Node) -> str:
    """The name of what a quantizer rounds, the same in every capture of a model."""
    source = node.all_input_nodes[0]
    return str(source.target) if source.op == "get_attr" else source.name
