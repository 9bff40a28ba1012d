"""Each teacher counts by how well it predicts the labels of the validation split.

Legend: K teachers, S of them stored, N validation samples, B batch, C classes.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.distill.types import CombineFn, Helper, TeacherLogits
from compression.errors import ShapeError
from compression.types import Frozen


def validation_weights(logits: Sequence[Tensor], labels: Tensor, *, sharpness: float) -> Tensor:
    """Return weights [S], float32, proportional to exp(-nll / sharpness), and summing to 1.

    Args:
        logits: of each teacher on the validation split, [N,C].
        labels: int64 [N].
        sharpness: in nats; a teacher worse by this much counts 1/e of the better one.
    """
    nll = [F.cross_entropy(each.detach().double(), labels) for each in logits]
    return (-torch.stack(nll) / sharpness).softmax(dim=0).float() if nll else torch.empty(0)


class ValidationWeights(Helper):
    """The weights as a buffer, so that they move to the device and are part of every step checkpoint.

    ``observe`` comes before a checkpoint is read and sets the size. Before it, or with no stored teachers, every
    teacher counts the same.
    """

    weights: Tensor
    """[S], float32; of the stored teachers."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.register_buffer("weights", torch.empty(0))

    def observe(self, panel: Sequence[TeacherLogits], dataset: Dataset) -> None:
        """Measure the stored teachers on the validation split."""
        logits = [teacher.validation_logits for teacher in panel]
        found = validation_weights(logits, dataset.validation.labels, sharpness=self.sharpness)
        self.weights = found.to(self.weights.device)

    def forward(self, logits: Tensor, labels: Tensor, student: Tensor | None = None) -> Tensor:
        """Return the same weights for every sample, [K,B], float32.

        Live teachers, which follow the stored ones, were not measured: each gets the mean weight of the stored ones.

        Args:
            logits: [K,B,C]; only its shape and device are looked at.
            labels: unused.
            student: unused.

        Raises:
            ShapeError: there are fewer teachers than were measured.
        """
        del labels, student
        total, batch, _ = logits.shape
        stored = len(self.weights)
        if total < stored:
            raise ShapeError(
                f"Teacher logits have {total} teachers, expected at least the {stored} stored ones whose weights were "
                "measured. Prepare the step again for this panel."
            )
        rows = torch.full((total,), 1.0 / max(stored, 1), device=logits.device)
        rows[:stored] = self.weights
        return (rows / rows.sum()).unsqueeze(1).repeat(1, batch)


class ValidationWeighted(Frozen):
    """Teachers weighted by their validation likelihood."""

    kind: Literal["validation_weighted"] = "validation_weighted"
    sharpness: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Nats of validation NLL in which a teacher's weight falls to 1/e; small: the best alone, large: all alike."""

    adds_snapshot: ClassVar[bool] = False
    """Whether a frozen copy of the student as it was before training joins the teachers."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Validation-weighted mixture",
        paper="Our own simple rule: a softmax of minus the validation NLL, one constant per teacher",
        summary="Better teachers have more to say, by the same amount on every sample: weights fall with the "
        "exponential of a teacher's negative log-likelihood on the validation split.",
        needs="Stored outputs of the validation split, and its labels. In quantization the float student, which is "
        "not stored, gets the mean weight of the stored teachers.",
        cost="Once per training, a pass over stored validation logits; nothing per step.",
        evidence="Measured on our data: see `measured`. The weights see the validation split that later chooses among "
        "students, by one number per teacher.",
    )

    def build(self) -> CombineFn:
        """Return the function that weighs teachers; it is a helper."""
        return ValidationWeights(self.sharpness)
