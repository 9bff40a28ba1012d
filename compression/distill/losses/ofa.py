"""OFA-KD: soft targets of the teachers in which the true class may count for more.

Legend: K teachers, B batch, C classes.
"""

from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.mixture import mixture
from compression.distill.types import LossFn, Needs, widened
from compression.types import Frozen, Outputs, TeacherOutputs


def enhanced(probs: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """Return (p + onehot)^epsilon - onehot of probabilities [B,C]; with epsilon above 1 its rows do not sum to 1."""
    target = F.one_hot(labels, probs.shape[-1]).to(probs.dtype)
    return (probs + target) ** epsilon - target


def ofa(student: Outputs, teachers: TeacherOutputs, labels: Tensor, *, temperature: float, epsilon: float) -> Tensor:
    """Return the cross entropy of the student against the teachers' enhanced targets, batch mean.

    Hao et al. 2023 (arXiv:2310.19444), the loss on logits alone: their branches on inner stages of the student
    are not part of it. The exponent also lowers the probabilities of the other classes, as in the authors' code.
    There is no factor temperature^2. With epsilon 1 it is the cross entropy with soft labels, in nats: kd at
    this temperature, over temperature^2, plus the teachers' entropy. With several teachers the probabilities are
    the weighted mixture of theirs, before the exponent.

    Args:
        student: logits [B,C].
        teachers: logits [K,B,C], weights [K,B].
        labels: int64 [B], the classes to enhance.
        temperature: above 1 flattens both sides.
        epsilon: exponent; above 1 the true class counts for more and every other one for less.

    Raises:
        ShapeError: the teachers have another number of classes than the student.
    """
    target = enhanced(mixture(student.logits, teachers, temperature), labels, epsilon=epsilon)
    log_student = F.log_softmax(widened(student.logits) / temperature, dim=-1)
    return -(target * log_student).sum(dim=-1).mean()


class Ofa(Frozen):
    """Cross entropy against the teachers' distribution with the true class enhanced."""

    kind: Literal["ofa"] = "ofa"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Softening of both sides; gradients shrink with its square."""
    epsilon: Annotated[float, Field(ge=1, le=10)] = 1.0
    """Exponent of the true class; 1 keeps the teachers' distribution. Values under different ones do not compare."""

    needs: ClassVar[Needs] = Needs()
    card: ClassVar[MethodCard] = MethodCard(
        name="One-for-all distillation (OFA-KD), logits",
        paper="Hao et al. 2023, One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge "
        "Distillation, arXiv:2310.19444",
        summary="Cross entropy against the teachers' distribution, in which an exponent lets the true class speak "
        "louder the surer the teachers are. Made for teachers of another architecture; without the paper's branches.",
        needs="Teacher logits on the same views; hard labels.",
        cost="That of kd: one softmax and a power.",
        evidence="The paper reports up to 8.0 points on CIFAR-100 and 0.7 on ImageNet between unlike architectures, "
        "with its branches, which are not here. Not measured on our data yet.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return partial(ofa, temperature=self.temperature, epsilon=self.epsilon)
