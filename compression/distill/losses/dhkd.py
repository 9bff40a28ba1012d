"""DHKD: a second head on the student's features learns the teachers' logits, and is dropped afterwards.

Legend: K teachers, B batch, C classes, D width of the student's penultimate features.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compression.card import MethodCard
from compression.distill.mixture import check_classes
from compression.distill.types import Helper, LossFn, Needs, Shapes, widened
from compression.types import Frozen, Outputs, TeacherOutputs


def binary_kl(logits: Tensor, target: Tensor, *, temperature: float) -> Tensor:
    """Return temperature^2 * sum over classes of log cosh((logits - target) / (2 temperature)), batch mean.

    That is the divergence of a fair coin from a coin with odds exp((logits - target) / temperature). The form
    by logarithms of sigmoids reaches infinity, and then gives no gradient, at gaps that this one survives. Both
    are [B,C].
    """
    gap = ((logits - target) / (2 * temperature)).abs()
    # log cosh x = |x| + log((1 + exp(-2|x|)) / 2); expm1 and log1p keep small gaps exact.
    log_cosh = gap + torch.log1p(torch.expm1(-2 * gap) / 2)
    return log_cosh.sum(dim=-1).mean() * temperature**2


class DualHead(Helper):
    """The loss of a second linear head against the teachers' logits, in float32 under autocast too.

    Yang et al. 2024 (arXiv:2411.08937). The head sees the student's penultimate features and is the only one that
    this loss trains beside the backbone: the student's own classifier learns from the other terms. With several
    teachers the target is the weighted mean of their logits. No gradient reaches the teachers.

    Ours: ``centred`` takes the mean of each teacher's row off, since a head must reproduce absolute logits and an
    offset says nothing about the classes. The authors' gradient alignment is ``align_gradients`` of the config: the
    step then makes a backward pass for this loss alone and takes from its gradient what runs against that of all
    other terms.
    """

    def __init__(self, *, temperature: float, stop_share: float, centred: bool) -> None:
        super().__init__()
        self.temperature, self.stop_share, self.centred = temperature, stop_share, centred

    def prepare(self, shapes: Shapes) -> None:
        """Make the second head."""
        self.head = nn.Linear(shapes.student_width, shapes.num_classes)

    @property
    def stopped(self) -> bool:
        """Whether the share of epochs in which this loss teaches is over."""
        last = math.ceil(self.stop_share * self.progress.epochs - 1e-9)  # 0.07 of 100 is 7 and a bit
        return self.progress.epoch >= last

    def target(self, teachers: TeacherOutputs) -> Tensor:
        """Return the logits [B,C] that the second head is to give."""
        logits, weights = widened(teachers.logits.detach()), widened(teachers.weights.detach())
        if self.centred:
            logits = logits - logits.mean(dim=-1, keepdim=True)
        return (weights.unsqueeze(-1) * logits).sum(dim=0)

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss; once stopped, 0 with a gradient of zeros.

        Args:
            student: penultimate features [B,D]; of its logits [B,C] the shape alone is looked at.
            teachers: logits [K,B,C], weights [K,B].
            labels: unused.

        Raises:
            ShapeError: the teachers have another number of classes than the student.
        """
        del labels
        check_classes(student.logits, teachers)
        features = widened(student.features["penultimate"])
        with torch.autocast(features.device.type, enabled=False):
            logits = self.head(features)
        if self.stopped:
            return logits.sum() * 0.0
        return binary_kl(logits, self.target(teachers), temperature=self.temperature)


class Dhkd(Frozen):
    """Distance of a second head's logits from the teachers'."""

    kind: Literal["dhkd"] = "dhkd"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum; it is a sum over classes, so take less, say 0.1, for a thousand of them."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Gap of logits from which on the pull no longer grows."""
    stop_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the epochs after which the term is 0; 1 teaches to the end."""
    align_gradients: bool = False
    """Take from this term's gradient on the backbone what runs against the other terms'; a second backward pass."""
    centred: bool = True
    """Take the mean of each row off the teachers' logits first, so that their offset does not matter."""

    needs: ClassVar[Needs] = Needs(
        student_features=True, another_term="it trains a second head and not the student's own"
    )
    card: ClassVar[MethodCard] = MethodCard(
        name="Dual-head distillation (DHKD)",
        paper="Yang et al. 2024, Dual-Head Knowledge Distillation, arXiv:2411.08937",
        summary="A second linear head on the student's features learns the teachers' logits, so that matching them "
        "shapes the backbone and leaves the classifier to the labels. The head is dropped at export.",
        needs="Teacher logits on the same views, penultimate features of the student, and another term that trains "
        "its own classifier, say cross_entropy.",
        cost="One more linear layer during training, with `align_gradients` a second backward pass; nothing "
        "afterwards.",
        evidence="The paper reports gains over earlier losses on CIFAR-100 and ImageNet, small ones by its reviewers' "
        "account. On scikit-learn's digits the same loss reached 91 % on a second head and 85 % on a single one. "
        "Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return DualHead(temperature=self.temperature, stop_share=self.stop_share, centred=self.centred)
