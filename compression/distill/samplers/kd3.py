"""KD^3 selection: each epoch shows samples of which teachers and student together are sure enough.

Legend: N samples of the split, S samples of an epoch, C classes, K teachers.
"""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.distill.types import Helper, TeacherLogits
from compression.errors import CompressionError
from compression.metrics import predict
from compression.train.batches import Sampler, count_of, shuffled
from compression.types import UNKNOWN, Frozen, known

HIGHEST = 0.95
"""Threshold of the class that is predicted most."""


def teacher_part(epoch: int, epochs: int) -> float:
    """Return a(epoch), the part of the teachers in the blend of logits, 0..1.

    1 - exp(-5 (1.5 (epoch + 1) / epochs - 1)^2) in the first half of the training and 0 in the second: the paper's
    schedule of 240 epochs, stretched to ``epochs``.
    """
    if 2 * epoch >= epochs:
        return 0.0
    return 1.0 - math.exp(-5.0 * (1.5 * (epoch + 1) / epochs - 1.0) ** 2)


def thresholds(counts: Tensor) -> Tensor:
    """Return 0.95 * b / (2 - b) per class, float64 [C], with b the ``counts`` [C] over the largest of them.

    In 0..0.95: a class that is rarely predicted needs less confidence.
    """
    share = counts.double() / counts.max().clamp(min=1)
    return HIGHEST * share / (2 - share)


def confident(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest probability of each row of logits [N,C], float64 [N], and whether it is above its threshold.

    The threshold is that of the predicted class, by how often each class is predicted in these rows.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    limits = thresholds(torch.bincount(predicted, minlength=logits.shape[1]))
    return confidence, confidence > limits[predicted]


class ConfidentSampler(Helper):
    """S = floor(share * N) samples, confident ones first, chosen anew before each epoch.

    Tang et al. 2023 (arXiv:2307.11469), the selection alone. Of the confident samples as many as fit are drawn at
    random; where there are fewer than S, the most confident of the others fill up, so that the length of an epoch and
    with it the schedule stay the same (the paper takes what there is). Until ``choose`` is called, and so in a control
    arm without teachers, all are alike.

    Teachers speak by the mean of their stored logits in view 0, each about the classes it knows; the student is run
    on plain images in inference mode. ``progress.epochs`` must be the length of the training.
    """

    eligible: Tensor
    confidence: Tensor

    def __init__(self, *, share: float, keep_labelled: bool) -> None:
        super().__init__()
        self.share, self.keep_labelled = share, keep_labelled
        self.register_buffer("eligible", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("confidence", torch.zeros(0))

    @property
    def name(self) -> str:
        """Kind and fields."""
        return f"kd3:{self.share}:{self.keep_labelled}"

    def look(self, panel: Sequence[TeacherLogits], teachers: Sequence[nn.Module], dataset: Dataset) -> None:
        """Take the data and what the panel says about it; ``teachers`` are not looked at."""
        del teachers
        self._dataset = dataset
        self._teachers = mean_logits(panel, dataset.train.ids)
        self.eligible = torch.ones(len(dataset.train.ids), dtype=torch.bool)
        self.confidence = torch.zeros(len(dataset.train.ids))

    def choose(self, epoch: int, model: nn.Module) -> None:
        """Score all samples for an epoch; mode and gradients of ``model`` are given back.

        Raises:
            CompressionError: ``progress`` has another length than the training.
        """
        if epoch >= self.progress.epochs:
            raise CompressionError(
                f"Sampler 'kd3' has a training of {self.progress.epochs} epochs, expected more than {epoch}. "
                "Set its progress before the training."
            )
        train = self._dataset.train
        part = teacher_part(epoch, self.progress.epochs)
        logits = predict(model, train, self._dataset.preprocessing)
        confidence, eligible = confident(part * self._teachers + (1 - part) * logits)
        if self.keep_labelled:
            eligible |= train.labels >= 0
        self.confidence.copy_(confidence)
        self.eligible.copy_(eligible)

    def size(self, n: int) -> int:
        """``floor(share * n)``, at least 1."""
        return count_of(n, self.share)

    def indices(self, epoch: int, labels: Tensor, seed: int) -> Tensor:
        """Return the samples of the epoch, int64 [S], in its random order: as ``choose`` last left it."""
        size, order = self.size(len(labels)), shuffled(len(labels), seed=seed, epoch=epoch)
        if len(self.eligible) == 0:
            return order[:size]
        eligible, confidence = self.eligible.cpu(), self.confidence.cpu()
        chosen, others = order[eligible[order]][:size], order[~eligible[order]]
        surest = confidence[others].argsort(descending=True, stable=True)[: size - len(chosen)]
        shown = torch.zeros(len(labels), dtype=torch.bool)
        shown[chosen], shown[others[surest]] = True, True
        return order[shown[order]]


def mean_logits(panel: Sequence[TeacherLogits], ids: Tensor) -> Tensor:
    """Return the mean of the panel's logits in view 0, float32 [N,C], over the teachers that know the class.

    A class that no teacher knows stays ``UNKNOWN``.
    """
    total, count = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    for teacher in panel:
        logits = teacher.logits(ids, 0)
        total, count = total + logits.masked_fill(~known(logits), 0.0), count + known(logits)
    return (total / count.clamp(min=1)).masked_fill(count == 0, UNKNOWN)


class Kd3(Frozen):
    """Samples that are predicted with confidence, by thresholds that are lower for rare classes."""

    kind: Literal["kd3"] = "kd3"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the train split that an epoch shows, and of the optimiser steps that it takes."""
    keep_labelled: bool = False
    """Samples with a label count as confident whatever is predicted; for a split of which few are labelled."""

    needs_teachers: ClassVar[bool] = False
    """Whether the teachers themselves are asked which samples to show."""
    adaptive: ClassVar[bool] = True
    """Whether the choice looks at the student or at what the teachers said."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Confident samples of a noisy pool (KD^3 selection)",
        paper="Tang et al. 2023, Distribution Shift Matters for Knowledge Distillation with Webly Collected Images, "
        "arXiv:2307.11469",
        summary="Research: before each epoch the blend of teachers' and student's predictions picks the samples that "
        "are confidently of some class, and leaves out what belongs to none. The paper's projector and contrastive "
        "term are not part of it.",
        needs="A panel, and a pool with images that belong to no class, say from the web; on clean data it only drops "
        "hard samples.",
        cost="`share` of the steps of an epoch on all data, and one pass of the student over all of it per epoch.",
        evidence="Measured on our data: see `measured`.",
    )

    def build(self) -> Sampler:
        """Return the sampler."""
        return ConfidentSampler(share=self.share, keep_labelled=self.keep_labelled)
