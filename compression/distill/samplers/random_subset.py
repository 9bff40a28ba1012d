"""One fixed, class-balanced random subset, and how much the teachers count on it.

Legend: N samples of the split, S samples of the subset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compression.card import MethodCard
from compression.distill.losses import AnyLoss
from compression.train.batches import Sampler, count_of, shuffled
from compression.types import Frozen


def teacher_share(share: float) -> float:
    """Return alpha, the share of the loss that belongs to the teachers when ``share`` of the data is left.

    0.5 on all data, rising in a straight line to 1 at a tenth of it: the less data, the more they count.
    """
    return min(max(0.5 + 0.5 * (1.0 - share) / 0.9, 0.5), 1.0)


def reweighted(losses: Sequence[AnyLoss], share: float) -> tuple[AnyLoss, ...]:
    """Return the losses with weights for ``share`` of the data.

    With W the sum of all weights, terms of kind ``cross_entropy`` get ``(1 - alpha) * W`` together and all others
    ``alpha * W``, in both groups shared as configured. Where a group has no weight nothing changes.
    """
    alpha, labels = teacher_share(share), sum(loss.weight for loss in losses if loss.kind == "cross_entropy")
    teachers = sum(loss.weight for loss in losses if loss.kind != "cross_entropy")
    if labels == 0 or teachers == 0:
        return tuple(losses)
    total = labels + teachers
    factors = {True: (1.0 - alpha) * total / labels, False: alpha * total / teachers}
    return tuple(
        loss.model_copy(update={"weight": loss.weight * factors[loss.kind == "cross_entropy"]}) for loss in losses
    )


@dataclass(frozen=True)
class SubsetSampler:
    """The same S = floor(share * N) samples in every epoch, each class in its share by largest remainders."""

    share: float

    @property
    def name(self) -> str:
        """Kind and fields."""
        return f"random_subset:{self.share}"

    def size(self, n: int) -> int:
        """``floor(share * n)``, at least 1."""
        return count_of(n, self.share)

    def indices(self, epoch: int, labels: Tensor, seed: int) -> Tensor:
        """The subset, int64 [S], shuffled anew in each epoch."""
        rows = self.subset(labels, seed)
        return rows[shuffled(len(rows), seed=seed, epoch=epoch)]

    def subset(self, labels: Tensor, seed: int) -> Tensor:
        """Row numbers int64 [S] in rising order: a pure function of labels and seed."""
        labels = labels - labels.min()  # samples without a label, -1, are a class of their own
        n, size = len(labels), self.size(len(labels))
        counts = torch.bincount(labels)
        quotas = counts * size // n
        remainders = counts * size % n
        quotas[remainders.argsort(descending=True, stable=True)[: size - int(quotas.sum())]] += 1
        order = shuffled(n, seed=seed, epoch=-1)  # an order that no epoch uses
        order = order[labels[order].argsort(stable=True)]
        place_in_class = torch.arange(n) - (counts.cumsum(0) - counts)[labels[order]]
        return order[place_in_class < quotas[labels[order]]].sort().values


class RandomSubset(Frozen):
    """One fixed random share of the data."""

    kind: Literal["random_subset"] = "random_subset"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the train split that is kept, of every class alike."""
    kd_weight_schedule: bool = True
    """Give the teachers more of the loss the less data is left: half of it on all, everything at a tenth."""

    needs_teachers: ClassVar[bool] = False
    """Whether the teachers themselves are asked which samples to show."""
    adaptive: ClassVar[bool] = False
    """Whether the choice looks at the student or at what the teachers said."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Random subset",
        paper="The baseline of data pruning; no paper of its own, the schedule of weights is ours.",
        summary="Trains on one class-balanced random part of the data and, by default, moves the weight of the loss "
        "from labels to teachers as the part shrinks.",
        needs="Labels, for the balance; a panel, for the weights.",
        cost="`share` of the steps of an epoch on all data.",
        evidence="Papers on distillation with pruned data report that random parts do as well as chosen ones when a "
        "teacher helps, and that the best weight of the teacher grows as data shrinks. "
        "Measured on our data: see `measured`.",
    )

    def build(self) -> Sampler:
        """Return the sampler."""
        return SubsetSampler(self.share)
