"""Cr-KD: among the classes its teachers know, the student keeps their relations; it may know more classes.

Legend: K teachers, B batch, C classes of the student.
"""

import math
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.mixture import check_classes
from compression.distill.types import LossFn, Needs, widened
from compression.types import Frozen, Outputs, TeacherOutputs, known


def shared_classes(teachers: TeacherOutputs) -> Tensor:
    """Return which classes every teacher with weight on the sample knows, bool [B,C]."""
    return (known(teachers.logits) | (teachers.weights <= 0).unsqueeze(-1)).all(dim=0)


def relation_weights(logits: Tensor, shared: Tensor) -> Tensor:
    """Return how much of the student's probability lies on the ``shared`` classes, over its batch mean, [B].

    The mean is 1 however little lies there. Both are [B,C]; a row without shared classes gets 0, unless all are such.
    """
    log_share = torch.logsumexp(logits.masked_fill(~shared, -math.inf), dim=-1) - torch.logsumexp(logits, dim=-1)
    log_share = log_share.masked_fill(~shared.any(dim=-1), torch.finfo(logits.dtype).min)
    return log_share.softmax(dim=0) * len(log_share)


def class_relation(
    student: Outputs,
    teachers: TeacherOutputs,
    labels: Tensor,
    *,
    temperature: float,
    tau: float,
    detach_weight: bool,
) -> Tensor:
    """Return temperature^2 * weight * cross entropy of the student among the shared classes, batch mean, in nats.

    Gu et al. 2023 (arXiv:2307.09158). Both sides are softened by tau * temperature, and are distributions over the
    classes that all teachers of the sample know; several teachers are mixed by their weights. A sample counts by the
    student's own probability that it is of such a class, relative to the batch. A sample whose teachers share no
    class counts 0. With teachers that know every class it is the cross entropy with their soft labels: kd at this
    temperature plus temperature^2 times the teachers' entropy.

    No gradient reaches the teachers. The authors let it through the weight, where the loss also falls by moving
    probability to novel classes; with ``detach_weight`` it does not, and novel logits get none at all from this term.
    The authors use it on unlabelled samples alone; here it is on all of them.

    Args:
        student: logits [B,C].
        teachers: logits [K,B,C], ``UNKNOWN`` where a teacher does not know the class, weights [K,B].
        labels: unused.
        temperature: softening of both sides; its square keeps gradients comparable.
        tau: scale of the logits, by which they are divided as well.
        detach_weight: whether the weight is a constant.

    Raises:
        ShapeError: the teachers have another number of classes than the student.
    """
    del labels
    check_classes(student.logits, teachers)
    logits = widened(student.logits) / (tau * temperature)
    theirs = widened(teachers.logits.detach()) / (tau * temperature)
    weights = widened(teachers.weights.detach())
    shared = shared_classes(teachers)
    weight = relation_weights(logits.detach() if detach_weight else logits, shared)
    any_shared = shared.any(dim=-1, keepdim=True)
    novel = ~shared & any_shared  # a row without shared classes keeps all, so that it stays finite, and counts 0
    target = (weights.unsqueeze(-1) * theirs.masked_fill(novel, -math.inf).softmax(dim=-1)).sum(dim=0)
    log_student = F.log_softmax(logits.masked_fill(novel, -math.inf), dim=-1).masked_fill(~shared, 0.0)
    return (weight * -(target * log_student).sum(dim=-1)).mean() * temperature**2


class ClassRelation(Frozen):
    """Cross entropy with the teachers among the classes they know, by how much a sample belongs there."""

    kind: Literal["class_relation"] = "class_relation"
    weight: Annotated[float, Field(ge=0)] = 0.1
    """Factor of this term in the sum."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 4.0
    """Softening of both sides."""
    tau: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Scale of the logits: 1 for a linear classifier; the paper's 0.1 is for cosines."""
    detach_weight: bool = True
    """Keep the weight of a sample out of the gradient; off as the authors', which rewards leaving the known classes."""

    needs: ClassVar[Needs] = Needs(another_term="it says nothing about classes that the teachers do not know")
    card: ClassVar[MethodCard] = MethodCard(
        name="Class-relation distillation (Cr-KD)",
        paper="Gu et al. 2023, Class-relation Knowledge Distillation for Novel Class Discovery, arXiv:2307.09158",
        summary="Research: for students with classes that their teachers lack. Among the known classes the student "
        "follows its teachers, more so on samples it thinks are of a known class; the novel classes are left to other "
        "terms. Without the paper's clustering of unlabelled samples.",
        needs="Teacher logits on the same views, and another term that teaches the novel classes, say cross_entropy; "
        "no labels.",
        cost="Two softmaxes per step.",
        evidence="The paper reports gains over earlier methods on almost all of its benchmarks of novel class "
        "discovery. Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return partial(class_relation, temperature=self.temperature, tau=self.tau, detach_weight=self.detach_weight)
