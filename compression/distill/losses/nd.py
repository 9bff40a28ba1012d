"""ND: features of the student point to the teachers' class means, and are long.

Legend: K teachers, B batch, C classes, N training samples, D width of the student's penultimate features, Dt of a
teacher's.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.distill.mixture import check_classes, check_features
from compression.distill.types import Helper, LossFn, Needs, Shapes, TeacherLogits, widened
from compression.errors import CompressionError, ShapeError
from compression.types import Frozen, Outputs, TeacherOutputs

CHUNK = 4096
"""Samples whose features are in memory at a time."""


def norm_and_direction(student: Tensor, teacher: Tensor, means: Tensor) -> Tensor:
    """Return 1 - <student, e> / max(|student|, |teacher|) per sample [B], with e the direction of ``means``.

    All are [B,Dt]; ``means`` holds the class mean of each sample's label. Where it is 0 the class has no direction,
    and the sample contributes 0 and no gradient. Gradient flows through the student's norm, which makes the loss
    one minus the cosine once the norm has passed the teacher's.
    """
    longest = torch.maximum(torch.linalg.vector_norm(student, dim=-1), torch.linalg.vector_norm(teacher, dim=-1))
    longest = longest.masked_fill(longest == 0, 1.0)
    length = torch.linalg.vector_norm(means, dim=-1, keepdim=True)
    known = length > 0
    direction = means / length.masked_fill(~known, 1.0)
    return known.squeeze(-1) * (1 - (student * direction).sum(dim=-1) / longest)


def class_means(teacher: TeacherLogits, dataset: Dataset, width: int) -> Tensor:
    """Return the mean feature [C,Dt] of each class of the train split in view 0; 0 for a class without samples."""
    labelled = dataset.train.labels >= 0
    ids, labels = dataset.train.ids[labelled], dataset.train.labels[labelled]
    sums = torch.zeros(dataset.num_classes, width, dtype=torch.float64)
    for start in range(0, len(ids), CHUNK):
        features = teacher.features(ids[start : start + CHUNK], 0)
        sums.index_add_(0, labels[start : start + CHUNK], features.double())
    counts = torch.bincount(labels, minlength=dataset.num_classes)
    return (sums / counts.clamp(min=1).unsqueeze(-1)).float()


class NormAndDirection(Helper):
    """The loss of the student's penultimate features against the teachers' class means, float32 under autocast too.

    Wang et al. 2023 (arXiv:2305.17007). Where a teacher's features are as wide as the student's they are compared
    as they are, otherwise behind batch norm, dropout and a linear layer of their own. Teachers count with their
    weights per sample. No gradient reaches the teachers. The logits of the student are not looked at, so that its
    classifier learns from the other terms.

    Class means are those of stored view 0 (the authors average over augmented images too); until ``observe`` has
    seen them they are 0, and so is the loss.
    """

    def __init__(self, *, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def prepare(self, shapes: Shapes) -> None:
        """Make a projector for each teacher, and room for its class means."""
        self.widths = shapes.teacher_widths
        self.projectors = nn.ModuleList(
            nn.Identity()
            if width == shapes.student_width
            else nn.Sequential(
                nn.BatchNorm1d(shapes.student_width), nn.Dropout(self.dropout), nn.Linear(shapes.student_width, width)
            )
            for width in shapes.teacher_widths
        )
        for number, width in enumerate(shapes.teacher_widths):
            self.register_buffer(f"means_{number}", torch.zeros(shapes.num_classes, width))

    def observe(self, panel: Sequence[TeacherLogits], dataset: Dataset) -> None:
        """Take the class means of every teacher's stored features.

        Raises:
            CompressionError: a teacher has no stored outputs.
        """
        if len(panel) != len(self.widths):
            raise CompressionError(
                f"Panel has stored outputs of {len(panel)} teachers, expected all {len(self.widths)}, because loss "
                "'nd' needs their class means. Store the outputs of every teacher, with features: true."
            )
        for number, (teacher, width) in enumerate(zip(panel, self.widths, strict=True)):
            self.means(number).copy_(class_means(teacher, dataset, width))

    def means(self, number: int) -> Tensor:
        """Class means [C,Dt] of a teacher; 0 for a class without samples."""
        return self.get_buffer(f"means_{number}")

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss, batch mean, 0..2.

        Args:
            student: penultimate features [B,D]; of its logits [B,C] the shape alone is looked at.
            teachers: features, K of [B,Dt], weights [K,B]; of its logits [K,B,C] the shape alone is looked at.
            labels: int64 [B].

        Raises:
            ShapeError: the teachers have other classes or widths than announced, or one sample trains a projector.
        """
        check_classes(student.logits, teachers)
        features = widened(student.features["penultimate"])
        self._check(features, teachers)
        weights = widened(teachers.weights.detach())
        losses = []
        for number, (projector, theirs) in enumerate(zip(self.projectors, teachers.features, strict=True)):
            with torch.autocast(features.device.type, enabled=False):
                ours = projector(features)
            losses.append(norm_and_direction(ours, widened(theirs.detach()), self.means(number)[labels]))
        return (weights * torch.stack(losses)).sum(dim=0).mean()

    def _check(self, features: Tensor, teachers: TeacherOutputs) -> None:
        check_features(features, teachers, self.widths)
        if self.training and len(features) < 2 and any(width != features.shape[1] for width in self.widths):
            raise ShapeError(
                "Batch has 1 sample, expected at least 2, because the projector of loss 'nd' normalises over the "
                "batch. Raise train.batch_size."
            )


class Nd(Frozen):
    """Distance of the student's features from the direction and length of the teachers'."""

    kind: Literal["nd"] = "nd"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum; the paper takes 0.5 to 2."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of features the projector drops; used where a teacher's features are wider or narrower."""

    needs: ClassVar[Needs] = Needs(
        student_features=True,
        teacher_features=True,
        labels=True,
        another_term="it shapes features and trains no classifier",
    )
    card: ClassVar[MethodCard] = MethodCard(
        name="Feature norm and direction (ND)",
        paper="Wang et al. 2023, Improving Knowledge Distillation via Regularizing Feature Norm and Direction, "
        "arXiv:2305.17007",
        summary="Turns the student's penultimate features towards the teachers' mean feature of the true class and "
        "makes them at least as long as the teacher's own. An addition to kd, not a replacement.",
        needs="Hard labels, stored penultimate features of every teacher, and another term that trains the "
        "student's classifier, say cross_entropy and kd.",
        cost="Stored features, one pass over them for the class means, and a linear layer per teacher of another "
        "width during training; nothing afterwards.",
        evidence="The paper reports 73.3 to 75.5 % on CIFAR-100 (ResNet32x4 to ResNet8x4) and 70.7 to 72.0 % on "
        "ImageNet (ResNet-34 to ResNet-18) when added to kd. Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return NormAndDirection(dropout=self.dropout)
