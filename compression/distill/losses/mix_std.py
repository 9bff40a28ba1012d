"""MIX-STD: each row of logits is divided by its own standard deviation before distributions are compared.

Legend: K teachers, B batch, C classes.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.mixture import check_classes
from compression.distill.types import LossFn, Needs, widened
from compression.types import UNKNOWN, Frozen, Outputs, TeacherOutputs, known

FLAT = 1e-3
"""Standard deviation by which flatter rows are divided; it bounds the gradient where a row is constant."""


def standardised(logits: Tensor, seen: Tensor | None = None) -> Tensor:
    """Return ``logits`` [...,C] less their mean and divided by their standard deviation, over the classes of a row.

    The deviation is that of the row itself (divisor C), and gradient flows through it. Where ``seen``, bool [...,C],
    is false the class is left out and stays ``UNKNOWN``.
    """
    if seen is None:
        seen = torch.ones_like(logits, dtype=torch.bool)
    count = seen.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = logits.masked_fill(~seen, 0.0).sum(dim=-1, keepdim=True) / count
    centred = (logits - mean).masked_fill(~seen, 0.0)
    variance = centred.square().sum(dim=-1, keepdim=True) / count
    return (centred / variance.clamp_min(FLAT**2).sqrt()).masked_fill(~seen, UNKNOWN)


def mix_std(student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
    """Return KL(teachers || student) of the distributions of standardised logits, batch mean, in nats.

    Choi et al. 2023 (arXiv:2211.03946). Every row gets a temperature of its own, its standard deviation, so that
    neither the scale nor the offset of a row matters; no squared temperature is multiplied in. With several teachers
    the target is the weighted mixture of their distributions. Gradient flows through the student's deviation, none
    reaches the teachers. Rows flatter than ``FLAT`` are divided by that instead, which ends the invariance for them.
    Made for mixed images, but any batch will do: labels are not looked at.

    Args:
        student: logits [B,C].
        teachers: logits [K,B,C], weights [K,B].
        labels: unused.

    Raises:
        ShapeError: the teachers have another number of classes than the student.
    """
    del labels
    check_classes(student.logits, teachers)
    theirs, weights = widened(teachers.logits.detach()), widened(teachers.weights.detach())
    target = (weights.unsqueeze(-1) * standardised(theirs, known(theirs)).softmax(dim=-1)).sum(dim=0)
    log_student = F.log_softmax(standardised(widened(student.logits)), dim=-1)
    return F.kl_div(log_student, target, reduction="batchmean")


class MixStd(Frozen):
    """Divergence from the teachers' distribution, with the standard deviation of each row as its temperature."""

    kind: Literal["mix_std"] = "mix_std"
    weight: Annotated[float, Field(ge=0)] = 0.9
    """Factor of this term in the sum; the reference takes 0.9 beside a cross entropy of 0.1."""

    needs: ClassVar[Needs] = Needs()
    card: ClassVar[MethodCard] = MethodCard(
        name="Standardised distillation (MIX-STD)",
        paper="Choi et al. 2023, Understanding the Role of Mixup in Knowledge Distillation: An Empirical Study, "
        "arXiv:2211.03946",
        summary="Divides each row of logits by its own standard deviation and then compares distributions, so that "
        "a mixed image on which everyone is unsure teaches as sharply as a plain one. Blind to confidence: calibrate "
        "before probabilities are used, or list cross_entropy beside it.",
        needs="Teacher logits on the same views; no labels. Goes with the online augmentation mixup.",
        cost="Two more passes over the logits.",
        evidence="Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return mix_std
