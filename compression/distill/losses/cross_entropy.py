"""Cross-entropy with the labels: what a student learns without any teacher."""

from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.losses.base import LossConfig, LossFn
from compression.types import Outputs, TeacherOutputs


def cross_entropy(
    student: Outputs, teachers: TeacherOutputs, labels: Tensor, *, label_smoothing: float
) -> Tensor:
    """Mean negative log-likelihood of the labels [B] under the student's logits [B,C], in nats.

    With ``label_smoothing`` e the target is (1 - e) one-hot + e / C (Szegedy et al. 2015, arXiv:1512.00567).
    The teachers are not looked at.
    """
    return F.cross_entropy(student.logits.float(), labels, label_smoothing=label_smoothing)


class CrossEntropy(LossConfig):
    """Agree with the labels."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability moved from the label to all classes."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Cross-entropy",
        paper="textbook; label smoothing: Szegedy et al. 2015, arXiv:1512.00567",
        summary="The negative log-likelihood of the true label.",
        needs="Labels.",
        cost="Nothing beyond the student's own step.",
        evidence="The control arm of every distillation.",
    )

    def build(self) -> LossFn:
        """The loss as a function of tensors."""
        return partial(cross_entropy, label_smoothing=self.label_smoothing)
