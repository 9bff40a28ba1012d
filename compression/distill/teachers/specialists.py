"""A sample belongs to the teachers that know its class.

Legend: K teachers, B batch, C classes.
"""

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compression.card import MethodCard
from compression.distill.types import CombineFn, widened
from compression.types import Frozen, known


def by_own_label(theirs: Tensor, labels: Tensor) -> Tensor:
    """Return equal weights [K,B] for the teachers that know the label, for all where none does.

    Args:
        theirs: bool [K,B,C], whether the teacher knows the class.
        labels: int64 [B], from 0 on.
    """
    num_teachers, batch, _ = theirs.shape
    mine = theirs.gather(-1, labels.view(1, -1, 1).expand(num_teachers, batch, 1)).squeeze(-1)
    mine = (mine | ~mine.any(dim=0)).float()
    return mine / mine.sum(dim=0)


def by_student(theirs: Tensor, student: Tensor) -> Tensor:
    """Return weights [K,B] proportional to the student's probability of the classes the teacher knows.

    Where no teacher knows a class all count the same.

    Args:
        theirs: bool [K,B,C].
        student: logits [B,C].
    """
    log_share = torch.logsumexp(student.masked_fill(~theirs, -math.inf), dim=-1)
    nobody = ~theirs.any(dim=-1).any(dim=0)
    return log_share.masked_fill(nobody, 0.0).softmax(dim=0).float()


def specialists(logits: Tensor, labels: Tensor, student: Tensor, *, by_label: bool) -> Tensor:
    """Return weights [K,B]: of the teachers that know the sample's class, as the label or else the student has it.

    After the mapping of samples to specialists of Gao et al. 2017 (arXiv:1711.07607), where a sample comes with its
    specialist. With a label the teachers that know it share the sample equally; all do if none knows it.

    Without one, ours: a teacher counts by the student's own probability that the sample is of a class the teacher
    knows. A specialist's confidence does not tell: it never saw the other classes and is often surest of what it
    knows nothing about, and one of two classes never falls below a half. p(class) = sum_k p(specialist k)
    p(class | specialist k) needs the first factor from somebody who has all classes, and that is the student. Where
    the specialists divide the classes among them, kd at temperature 1 then moves the student within the classes of
    each, and by nothing between them: the rule confirms the student's guess no further than it goes. Between them it
    must learn from labels.

    Args:
        logits: [K,B,C], ``UNKNOWN`` where a teacher does not know the class.
        labels: int64 [B]; -1 where there is none.
        student: logits [B,C].
        by_label: use labels where there are any.
    """
    theirs, student = known(logits.detach()), widened(student.detach())
    if not by_label:
        return by_student(theirs, student)
    return torch.where(labels >= 0, by_own_label(theirs, labels.clamp(min=0)), by_student(theirs, student))


class Specialists(Frozen):
    """The teachers that know the sample's class."""

    kind: Literal["specialists"] = "specialists"
    labels: bool = True
    """Choose by the label; off, and on samples without one, by the student's probability of a teacher's classes."""

    adds_snapshot: ClassVar[bool] = False
    """Whether a frozen copy of the student as it was before training joins the teachers."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Specialists",
        paper="Gao et al. 2017, Knowledge Concentration, arXiv:1711.07607; the rule without labels is ours",
        summary="For teachers that each know some of the classes: a sample is taught by those that know its label, in "
        "equal shares. A sample without one is shared by how probable the student finds the classes of each.",
        needs="At least two teachers with other sets of classes; labels, or cross_entropy beside the teachers on "
        "enough labelled samples, from which the student learns whose a sample is.",
        cost="A look-up per step; without labels a sum over the student's probabilities.",
        evidence="Measured on our data: see `measured`.",
    )

    def build(self) -> CombineFn:
        """Return the function that weighs teachers."""
        return partial(specialists, by_label=self.labels)
