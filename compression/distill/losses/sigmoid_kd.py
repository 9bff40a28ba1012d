"""Knowledge Concentration: one student learns from specialists, class by class with sigmoids.

Legend: K teachers, B batch, C classes.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.distill.mixture import check_classes
from compression.distill.types import Helper, LossFn, Needs, Shapes, TeacherLogits, widened
from compression.errors import CompressionError, ShapeError
from compression.types import Frozen, Outputs, TeacherOutputs, known


def targets(teachers: TeacherOutputs, *, top_k: int) -> tuple[Tensor, Tensor]:
    """Return what the student's sigmoids are to give [B,C], 0..1, and whether that class is taught at all, bool [B,C].

    A teacher's probabilities are over the classes it knows and 0 elsewhere; the target is their weighted sum, of
    which the ``top_k`` largest stay. Taught are the classes that a teacher with weight on the sample knows. No
    gradient reaches the teachers.
    """
    logits, weights = widened(teachers.logits.detach()), widened(teachers.weights.detach()).unsqueeze(-1)
    theirs = known(logits)
    # Beside a known class the probability of an unknown one is 0 already; the mask is for rows without a known class.
    mixed = (weights * theirs * logits.softmax(dim=-1)).sum(dim=0).clamp(max=1.0)
    taught = (theirs & (weights > 0)).any(dim=0)
    if top_k >= mixed.shape[-1]:
        return mixed, taught
    values, places = mixed.topk(top_k, dim=-1)
    return torch.zeros_like(mixed).scatter(-1, places, values), taught


def sigmoid_cross_entropy(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Return the cross entropy of sigmoids, sum over the ``counted`` classes, batch mean, in nats; all are [B,C]."""
    costs = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    return costs.masked_fill(~counted, 0.0).sum(dim=-1).mean()


def sigmoid_kd(student: Outputs, teachers: TeacherOutputs, labels: Tensor, *, top_k: int, mask_unknown: bool) -> Tensor:
    """Return the sigmoid cross entropy of the student against its specialists, sum over classes, batch mean, in nats.

    Gao et al. 2017 (arXiv:1711.07607). Its least value is the entropy of the target, not 0. It is a sum, so that a
    logit's gradient, sigmoid - target, does not shrink with the number of classes. Unlike the authors' specialists,
    which are sigmoids too, ours give a softmax over what they know.

    Args:
        student: logits [B,C].
        teachers: logits [K,B,C], ``UNKNOWN`` where a teacher does not know the class, weights [K,B].
        labels: unused.
        top_k: number of teachers' probabilities that are kept per sample; the rest are 0.
        mask_unknown: leave out the classes that no teacher with weight on the sample knows; off, push them to 0.

    Raises:
        ShapeError: the teachers have another number of classes than the student.
    """
    del labels
    check_classes(student.logits, teachers)
    target, taught = targets(teachers, top_k=top_k)
    return sigmoid_cross_entropy(widened(student.logits), target, taught if mask_unknown else torch.ones_like(taught))


def paced(logits: Tensor, theirs: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """Return logits [B,C] that have, over the classes of teacher k, the length ``scales[k]``.

    A class of several teachers gets their mean, by weight on the sample, or equally where they have none. A class
    that no teacher knows keeps its logit.

    Args:
        logits: [B,C].
        theirs: bool [K,B,C], whether the teacher knows the class.
        weights: [K,B].
        scales: [K].
    """
    own = logits * theirs
    length = torch.linalg.vector_norm(own, dim=-1, keepdim=True)
    scaled = scales.view(-1, 1, 1) * own / length.masked_fill(length == 0, 1.0)
    share = weights.unsqueeze(-1) * theirs
    share = torch.where(share.sum(dim=0) > 0, share, theirs.to(share.dtype))
    total = share.sum(dim=0)
    mean = (share * scaled).sum(dim=0) / total.masked_fill(total == 0, 1.0)
    return torch.where(total > 0, mean, logits)


class SelfPaced(Helper):
    """``sigmoid_kd`` on logits that are normalised over each teacher's classes and scaled with a learned number.

    Gao et al. 2017 (arXiv:1711.07607), self-paced learning at the level of verticals, here the classes of one
    teacher. The scale starts at the root of their number, and lets the student take up one vertical faster than
    another. It is left behind with the helper, so that the student keeps directions within each vertical alone: how
    long its logits are, and how they compare with those of other verticals, is for another term to teach.

    Ours: the scale's logarithm is what is learned, because a scale below 0 would turn the order of the classes round,
    and teachers may share classes, see ``paced``.
    """

    def __init__(self, *, top_k: int, mask_unknown: bool) -> None:
        super().__init__()
        self.top_k, self.mask_unknown = top_k, mask_unknown

    def prepare(self, shapes: Shapes) -> None:
        """Make a scale per teacher, as if each knew every class.

        Raises:
            CompressionError: the number of teachers is not announced.
        """
        if shapes.num_teachers < 1:
            raise CompressionError(
                f"Loss 'sigmoid_kd' has {shapes.num_teachers} teachers announced, expected at least 1, because "
                "self_paced learns a scale for each. Give Shapes.num_teachers, or set self_paced to false."
            )
        self.log_scales = nn.Parameter(torch.full((shapes.num_teachers,), math.log(shapes.num_classes) / 2))

    @property
    def scales(self) -> Tensor:
        """Length of the logits of each teacher's classes, [K]."""
        return self.log_scales.exp()

    def observe(self, panel: Sequence[TeacherLogits], dataset: Dataset) -> None:
        """Start the scale of each stored teacher at the root of the number of classes it knows."""
        del dataset
        with torch.no_grad():
            for number, teacher in enumerate(panel):
                count = int(known(teacher.validation_logits[0]).sum())
                self.log_scales[number] = math.log(max(count, 1)) / 2

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss, sum over classes, batch mean, in nats; arguments as of ``sigmoid_kd``.

        Raises:
            ShapeError: the teachers have other classes than the student, or are more or fewer than announced.
        """
        del labels
        check_classes(student.logits, teachers)
        if len(teachers.logits) != len(self.log_scales):
            raise ShapeError(
                f"Teacher logits have {len(teachers.logits)} teachers, expected the {len(self.log_scales)} whose "
                "scales loss 'sigmoid_kd' learns. Prepare the step again for this panel."
            )
        target, taught = targets(teachers, top_k=self.top_k)
        weights = widened(teachers.weights.detach())
        logits = paced(widened(student.logits), known(teachers.logits.detach()), weights, self.scales)
        return sigmoid_cross_entropy(logits, target, taught if self.mask_unknown else torch.ones_like(taught))


class SigmoidKd(Frozen):
    """Sigmoid cross entropy against specialists, each on the classes it knows."""

    kind: Literal["sigmoid_kd"] = "sigmoid_kd"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum; it is a sum over classes, so take less, say 0.1, for a thousand of them."""
    top_k: Annotated[int, Field(ge=1)] = 100
    """Probabilities kept per sample, at most all; the rest count as 0."""
    mask_unknown: bool = True
    """Say nothing about classes that no teacher of the sample knows; off, push them to 0."""
    self_paced: bool = False
    """Normalise the logits of each teacher's classes and learn their scale."""

    needs: ClassVar[Needs] = Needs(
        another_term="it compares classes only with those that the same specialist knows, and not with the others"
    )
    card: ClassVar[MethodCard] = MethodCard(
        name="Knowledge Concentration",
        paper="Gao et al. 2017, Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN, "
        "arXiv:1711.07607",
        summary="For specialists that each know some of the classes: the student's sigmoids learn the largest "
        "probabilities of the sample's specialists. What this trains are sigmoids: the first choice of the student "
        "means the same, but its softmax is no calibrated probability, so calibrate afterwards. Without the paper's "
        "structurally connected layers.",
        needs="Teacher logits on the same views, teachers 'specialists' where the sets of classes differ, and another "
        "term that compares all classes, say cross_entropy. With `mask_unknown: false` this term does that too, at "
        "the price of pushing down what a specialist merely does not know. No labels.",
        cost="One softmax over stored logits per step; with `self_paced` one number per teacher during training, "
        "nothing afterwards.",
        evidence="By a second-hand account the paper gains about 4 points of precision from distillation, with 100 "
        "thousand classes and 20 specialists. "
        "Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight; self-paced it is a helper."""
        if self.self_paced:
            return SelfPaced(top_k=self.top_k, mask_unknown=self.mask_unknown)
        return partial(sigmoid_kd, top_k=self.top_k, mask_unknown=self.mask_unknown)
