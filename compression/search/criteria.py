"""How a channel's worth is scored before pruning: one small class for each criterion.

A criterion ranks channels only within one group of coupled layers; how many of them stay is decided by
``compression.search.prune``.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from compression.card import MethodCard
from compression.errors import CompressionError
from compression.types import Frozen

ScoreFn = Callable[[Any], Tensor | None]
"""Takes a torch-pruning group, gives one score per channel of its root; None when it cannot score it."""


class Magnitude(Frozen):
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


class Taylor(Frozen):
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

    def build(self, *, seed: int) -> ScoreFn:
        """The scoring function; parameters must carry gradients, ``seed`` changes nothing."""
        del seed
        return _torch_pruning().importance.GroupTaylorImportance()


class BnScale(Frozen):
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


class RandomChannels(Frozen):
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


AnyCriterion = Magnitude | Taylor | BnScale | RandomChannels

Criterion = Literal["magnitude", "taylor", "bn_scale", "random"]
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
    if isinstance(criterion, Taylor) and not has_calibration:
        raise CompressionError(
            "Criterion 'taylor' has no calibration images, expected one labelled batch. "
            "Pass calibration=(images, labels), or choose criterion 'magnitude'."
        )
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if isinstance(criterion, BnScale) and not any(isinstance(module, norms) for module in model.modules()):
        raise CompressionError(
            f"Criterion 'bn_scale' has no batch norm in model '{type(model).__name__}', expected at least "
            "one. Choose criterion 'magnitude' or 'taylor'."
        )


def _torch_pruning() -> Any:
    import torch_pruning

    return torch_pruning
