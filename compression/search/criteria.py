"""How a channel's worth is scored before pruning: one small class for each criterion.

Scores of a criterion compare channels of one group of coupled layers; ``compression.search.units`` brings those of
several groups to one scale where they are compared, and decides how many channels stay.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.errors import CompressionError
from compression.types import Frozen

ScoreFn = Callable[[Any], Tensor | None]
"""Takes a torch-pruning group, gives one score per channel of its root; None when it cannot score it."""

_CHUNK = 256  # images of one forward pass
_Layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)


class _Criterion(Frozen):
    """What criteria share."""

    needs_calibration: ClassVar[bool] = False
    """Whether ``prepare`` must have labelled images."""

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Leaves in ``grad`` of the parameters of ``model`` (eval mode) what the scoring function reads there.

        ``images`` are normalised, [N,C,H,W], with labels [N].
        """


class Magnitude(_Criterion):
    """Sum of squared weights of a channel over all coupled layers."""

    kind: Literal["magnitude"] = "magnitude"
    card: ClassVar[MethodCard] = MethodCard(
        name="Group magnitude",
        paper="Fang et al. 2023, DepGraph, arXiv:2301.12900",
        summary="Keeps the channels whose weights, summed over every coupled layer, have the largest norm.",
        needs="A trained parent; no data.",
        cost="Seconds, once per candidate; nothing while training.",
        evidence="Measured on Fashion-MNIST: 88.1-88.6 % at 5.3 % of the parent's MACs after five epochs, "
        "against 86.3-86.5 % for a fresh net of that size.",
    )

    def build(self, *, seed: int) -> ScoreFn:
        """The scoring function; ``seed`` changes nothing."""
        del seed
        return _torch_pruning().importance.GroupMagnitudeImportance(p=2)


class Taylor(_Criterion):
    """First-order change of the loss when a channel is removed: sum of |weight x gradient|."""

    kind: Literal["taylor"] = "taylor"
    card: ClassVar[MethodCard] = MethodCard(
        name="Group Taylor",
        paper="Molchanov et al. 2019, arXiv:1906.10771",
        summary="Keeps the channels whose removal would, to first order, change the loss most.",
        needs="A trained parent and labelled calibration images.",
        cost="One backward pass over the calibration images per candidate.",
        evidence="Measured on Fashion-MNIST: 87.1-88.1 % where magnitude had 88.1-88.6 % at equal MACs.",
    )
    needs_calibration: ClassVar[bool] = True

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Leaves the gradient of the mean cross entropy."""
        device = next(model.parameters()).device
        with torch.enable_grad():
            for start in range(0, len(labels), _CHUNK):
                logits = model(images[start : start + _CHUNK].to(device))
                part = F.cross_entropy(logits, labels[start : start + _CHUNK].to(device), reduction="sum")
                (part / len(labels)).backward()

    def build(self, *, seed: int) -> ScoreFn:
        """The scoring function; parameters must carry gradients, ``seed`` changes nothing."""
        del seed
        return _torch_pruning().importance.GroupTaylorImportance()


class Hessian(_Criterion):
    """Second-order change of the loss when a channel is removed: sum of 0.5 x curvature x weight^2.

    The saliency of Optimal Brain Damage, summed over all weights and biases that go with the channel, in every
    coupled layer. Its assumptions are kept: the parent sits in a minimum (no first-order term), and curvature
    between two weights is zero (so a sum over weights). One more is ours: the second derivative is taken to be the
    mean square of per-sample gradients of the cross entropy at the true labels, the diagonal of the empirical
    Fisher matrix, where the paper back-propagates second derivatives (the diagonal of the generalised Gauss-Newton
    matrix). The two agree as far as the parent's probabilities are those of the labels; samples that it knows
    perfectly add nothing to ours.
    """

    kind: Literal["hessian"] = "hessian"
    card: ClassVar[MethodCard] = MethodCard(
        name="Group curvature (Optimal Brain Damage)",
        paper="LeCun, Denker and Solla 1989, Optimal Brain Damage, NeurIPS 2",
        summary="Keeps the channels whose removal would, to second order, raise the loss most; the curvature of a "
        "weight is estimated by its mean squared gradient over samples.",
        needs="A trained parent and labelled calibration images.",
        cost="One backward pass for each calibration image, once for each parent.",
        evidence="Not measured on our data yet.",
    )
    needs_calibration: ClassVar[bool] = True

    def prepare(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Leaves the mean over samples of the squared gradient of a sample's cross entropy."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = parameters[0].device
        squares = [torch.zeros_like(parameter) for parameter in parameters]
        with torch.enable_grad():
            for image, label in zip(images.to(device), labels.to(device), strict=True):
                loss = F.cross_entropy(model(image[None]), label[None])
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for square, gradient in zip(squares, gradients, strict=True):
                    if gradient is not None:
                        square.addcmul_(gradient, gradient, value=1.0 / len(labels))
        for parameter, square in zip(parameters, squares, strict=True):
            parameter.grad = square

    def build(self, *, seed: int) -> ScoreFn:
        """The scoring function; parameters must carry what ``prepare`` leaves, ``seed`` changes nothing."""
        del seed
        return _saliency


class BnScale(_Criterion):
    """Size of the batch-norm scale behind a channel; groups without batch norm go by magnitude."""

    kind: Literal["bn_scale"] = "bn_scale"
    card: ClassVar[MethodCard] = MethodCard(
        name="Batch-norm scale",
        paper="Liu et al. 2017, Network Slimming, arXiv:1708.06519",
        summary="Keeps the channels with the largest batch-norm scale; "
        "groups that have no batch norm are ranked by magnitude.",
        needs="A trained parent with batch norm; works best when its scales were trained with an L1 term.",
        cost="Seconds, once per candidate.",
        evidence="The paper reports up to 20x smaller VGG nets with an L1 term; not measured on our data.",
    )

    def build(self, *, seed: int) -> ScoreFn:
        """The scoring function; ``seed`` changes nothing."""
        del seed
        importance = _torch_pruning().importance
        by_scale = importance.BNScaleImportance()
        by_weight = importance.GroupMagnitudeImportance(p=2)

        def score(group: Any) -> Tensor | None:
            scores = by_scale(group)
            return by_weight(group) if scores is None else scores

        return score


class RandomChannels(_Criterion):
    """A seeded draw: the control arm that tells what ranking by any criterion is worth."""

    kind: Literal["random"] = "random"
    card: ClassVar[MethodCard] = MethodCard(
        name="Random channels",
        paper="Control arm; see Li et al., CVPR 2022, Revisiting Random Channel Pruning",
        summary="Keeps channels drawn at random with the study's seed.",
        needs="Nothing.",
        cost="Seconds, once per candidate.",
        evidence="The paper finds no criterion that clearly beats it once widths are searched; "
        "not measured on our data.",
    )

    def build(self, *, seed: int) -> ScoreFn:
        """The scoring function; equal seeds draw equal channels for the same network."""
        generator = torch.Generator().manual_seed(seed)

        def score(group: Any) -> Tensor | None:
            return torch.rand(len(group[0].idxs), generator=generator)

        return score


AnyCriterion = Magnitude | Taylor | BnScale | RandomChannels | Hessian

Criterion = Literal["magnitude", "taylor", "bn_scale", "random", "hessian"]
"""A criterion's kind; none has settings of its own, so a recipe names it with one word."""


def criterion_named(kind: Criterion) -> AnyCriterion:
    """The criterion of that kind.

    Raises:
        CompressionError: no criterion has that kind.
    """
    known: dict[str, type[AnyCriterion]] = {
        member.model_fields["kind"].default: member for member in get_args(AnyCriterion)
    }
    if kind not in known:
        raise CompressionError(
            f"Criterion '{kind}' has no implementation, expected one of {', '.join(known)}. Name one of them."
        )
    return known[kind]()


def check_criterion(criterion: AnyCriterion, model: nn.Module, *, has_calibration: bool) -> None:
    """Nothing, when ``criterion`` can rank the channels of ``model``.

    Raises:
        CompressionError: calibration images or batch norms are needed and absent.
    """
    if criterion.needs_calibration and not has_calibration:
        raise CompressionError(
            f"Criterion '{criterion.kind}' has no calibration images, expected one labelled batch. "
            "Pass calibration=(images, labels), or choose criterion 'magnitude'."
        )
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if isinstance(criterion, BnScale) and not any(isinstance(module, norms) for module in model.modules()):
        raise CompressionError(
            f"Criterion 'bn_scale' has no batch norm in model '{type(model).__name__}', expected at least "
            "one. Choose criterion 'magnitude' or 'taylor'."
        )


@torch.no_grad()
def _saliency(group: Any) -> Tensor | None:
    """0.5 x grad x weight^2 of each channel of the group's root, summed over all that goes with it."""
    total = torch.zeros(len(group[0].idxs))
    scored = False
    for item in group:
        worth = _worth_by_channel(item.dep)
        if worth is None or None in item.root_idxs:
            continue
        total.index_add_(0, torch.tensor(item.root_idxs), worth.float().cpu()[item.idxs])
        scored = True
    return total if scored else None


def _worth_by_channel(dep: Any) -> Tensor | None:
    """The saliency of every channel of one layer along the side that is cut; None for what has no weights."""
    module, function = dep.target.module, _torch_pruning().pruner.function
    if isinstance(module, nn.Parameter):
        return _sums(_saliency_of(module).movedim(dep.target.pruning_dim, 0))
    if isinstance(module, _Norms):
        own = [_saliency_of(each) for each in (module.weight, module.bias) if each is not None and each.ndim == 1]
        return torch.stack(own).sum(0) if own else None
    if not isinstance(module, _Layers):
        return None
    worth = _saliency_of(module.weight)
    if dep.handler in (function.prune_conv_in_channels, function.prune_linear_in_channels):
        parts = 1 if isinstance(module, nn.Linear) else module.groups  # each reads channels of its own
        return _sums(worth.unflatten(0, (parts, -1)).transpose(1, 2).flatten(0, 1))
    return _sums(worth) if module.bias is None else _sums(worth) + _saliency_of(module.bias)


def _sums(worth: Tensor) -> Tensor:
    """Over all but the first dimension."""
    return worth.reshape(len(worth), -1).sum(1)


def _saliency_of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else 0.5 * tensor.grad * tensor.square()


def _torch_pruning() -> Any:
    import torch_pruning

    return torch_pruning
