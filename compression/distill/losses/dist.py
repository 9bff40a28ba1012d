"""Correlation distillation: the student's probabilities rise and fall with its teachers'.

Legend: K teachers, B batch, C classes.
"""

from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.mixture import log_mixture
from compression.distill.types import LossFn, Needs, widened
from compression.types import Frozen, Outputs, TeacherOutputs

FLAT = 1e-3
"""Length under which a row, scaled to a largest entry of 1 and centred, counts as constant."""


def dist(
    student: Outputs, teachers: TeacherOutputs, labels: Tensor, *, beta: float, gamma: float, temperature: float
) -> Tensor:
    """Return temperature^2 * (beta * inter + gamma * intra), each 1 - Pearson correlation of probabilities.

    Huang et al. 2022 (arXiv:2205.10536). Inter correlates the classes of one sample and is a mean over samples;
    intra correlates the samples of one class and is a mean over classes, so the loss is not a mean over the batch:
    it needs batches of some size. With several teachers the target is the weighted mixture of their softened
    distributions. Labels are not looked at.

    Correlation sees neither scale nor offset, so nothing keeps the student as confident as its teachers. At a
    temperature of 4 with its square as factor, a student was left with almost flat probabilities (93 % right, a
    calibration error of 76 %, on small digits): keep 1, or calibrate before confidences are used.

    A row whose teachers are constant (also: any class in a batch of one) has no correlation and counts 0. A student
    row that is nearly constant is divided by ``FLAT`` instead of its length, which bounds the gradient.

    Args:
        student: logits [B,C].
        teachers: logits [K,B,C], weights [K,B].
        labels: unused.
        beta: factor of the inter-class term.
        gamma: factor of the intra-class term.
        temperature: above 1 flattens both sides.

    Raises:
        ShapeError: the teachers have another number of classes than the student.
    """
    del labels
    logits = widened(student.logits)
    log_student = F.log_softmax(logits / temperature, dim=-1)
    log_teacher = log_mixture(logits, teachers, temperature)
    inter, intra = (_unrelated(log_student, log_teacher, dim) for dim in (1, 0))
    return (beta * inter + gamma * intra) * temperature**2


def _unrelated(log_student: Tensor, log_teacher: Tensor, dim: int) -> Tensor:
    """Mean of 1 - correlation along ``dim`` of the probabilities; 0 for each row whose teachers are constant."""
    student, teacher = _centred(log_student, dim), _centred(log_teacher, dim)
    length = torch.linalg.vector_norm(teacher, dim=dim)
    dot = (_unit(student, dim) * _unit(teacher, dim)).sum(dim=dim)
    return torch.where(length > FLAT, 1 - dot, 0.0).mean()


def _centred(log_probs: Tensor, dim: int) -> Tensor:
    """Probabilities relative to the largest along ``dim``, less their mean; the scale changes no correlation."""
    relative = (log_probs - log_probs.amax(dim=dim, keepdim=True).detach()).exp()
    return relative - relative.mean(dim=dim, keepdim=True)


def _unit(centred: Tensor, dim: int) -> Tensor:
    return centred / torch.linalg.vector_norm(centred, dim=dim, keepdim=True).clamp_min(FLAT)


class Dist(Frozen):
    """Correlation with the teachers' probabilities, over the classes of a sample and the samples of a class."""

    kind: Literal["dist"] = "dist"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the inter-class term: correlation over the classes of one sample."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the intra-class term: correlation over the samples of one class."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Softening of both sides; at 4 the student's probabilities end almost flat."""

    needs: ClassVar[Needs] = Needs()
    card: ClassVar[MethodCard] = MethodCard(
        name="Correlation distillation (DIST)",
        paper="Huang et al. 2022, arXiv:2205.10536",
        summary="Asks only that the student's probabilities correlate with its teachers', over the classes of each "
        "sample and over the samples of each class; made for teachers far stronger than the student. Blind to "
        "confidence: keep temperature 1 (4 leaves probabilities almost flat), list cross_entropy beside it, and "
        "calibrate.",
        needs="Teacher logits on the same views, batches larger than one; no labels.",
        cost="A few more passes over the logits. For 128 samples on one CPU thread, with gradient: "
        "0.9 ms with 10 classes, 1.4 ms with 100, 16 ms with 1000 (kd 0.2, 0.4 and 1.8 ms).",
        evidence="Others report, in one recipe each: 75.8 % for ResNet-32x4 to 8x4 on CIFAR-100 (kd 73.3), and 75.4 % "
        "for MobileNetV4 large to medium on ImageNet (kd 74.9); 76.6 % for ResNet-152 to ResNet-50 is below kd's "
        "76.8. Measured on our data: see `measured`.",
    )

    @model_validator(mode="after")
    def _some_factor(self) -> "Dist":
        if self.beta + self.gamma <= 0:
            raise ValueError("dist has beta and gamma 0, expected one of them above. Raise one of them.")
        return self

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return partial(dist, beta=self.beta, gamma=self.gamma, temperature=self.temperature)
