"""Plackett-Luce distillation: the student ranks the classes as its teachers do, the label first.

Legend: K teachers, B batch, C classes.
"""

from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compression.card import MethodCard
from compression.distill.mixture import mixture
from compression.distill.types import LossFn, Needs, widened
from compression.types import Frozen, Outputs, TeacherOutputs


def pld(
    student: Outputs, teachers: TeacherOutputs, labels: Tensor, *, temperature: float, label_floor: float
) -> Tensor:
    """Return the weighted negative log-likelihood of a ranking under the student, batch mean, in nats.

    Bassam, Zhu and Bian 2025 (arXiv:2506.12542). The ranking is the label, then the other classes from the most to
    the least probable for the teachers. The student chooses class after class among those that are left; the choice
    at rank k costs -log softmax over the classes from rank k on, and counts as much as the teachers' probability of
    that class. With several teachers, ranking and probabilities come from the weighted mixture of their softened
    distributions. A teacher that is sure of the label leaves plain cross entropy; a uniform one leaves ListMLE / C.

    This is no divergence: it is positive where student and teacher agree, and goes to 0 only as rightly ordered
    logits grow without bound. Where the teachers are sure of a wrong class the label counts next to nothing;
    ``label_floor`` is for those.

    Args:
        student: logits [B,C].
        teachers: logits [K,B,C], weights [K,B].
        labels: int64 [B].
        temperature: softening of the teachers; the student is not softened, hence no temperature^2.
        label_floor: factor of a plain cross entropy that is added.

    Raises:
        ShapeError: the teachers have another number of classes than the student.
    """
    logits = widened(student.logits)
    probs = mixture(logits, teachers, temperature)
    label_first = probs.scatter(1, labels.unsqueeze(1), float("inf"))
    ranking = label_first.argsort(dim=1, descending=True, stable=True)
    ranked = logits.gather(1, ranking)
    among_those_left = ranked.flip(1).logcumsumexp(dim=1).flip(1) - ranked
    # the first choice is among all classes, so its cost is the cross entropy with the label
    costs = (probs.gather(1, ranking) * among_those_left).sum(dim=1) + label_floor * among_those_left[:, 0]
    return costs.mean()


class Pld(Frozen):
    """Likelihood of the teachers' ranking of the classes, with the label put first."""

    kind: Literal["pld"] = "pld"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Softening of the teachers; 1 takes their probabilities as they are."""
    label_floor: Annotated[float, Field(ge=0)] = 0.0
    """Factor of a plain cross entropy that is added, for labels that the teachers are sure against; 0.1 is a start."""

    needs: ClassVar[Needs] = Needs(labels=True)
    card: ClassVar[MethodCard] = MethodCard(
        name="Plackett-Luce distillation",
        paper="Bassam, Zhu, Bian 2025, arXiv:2506.12542",
        summary="Asks the student to rank the classes as its teachers do, the label first, each rank weighted with "
        "the teachers' probability. Stands alone, without cross entropy beside it; has no finite minimum, so calibrate "
        "afterwards.",
        needs="Teacher logits on the same views; hard labels.",
        cost="A sort and a running log-sum-exp. For 128 samples on one CPU thread, with gradient: "
        "0.6 ms with 10 classes, 2.6 ms with 100, 47 ms with 1000 (kd 0.2, 0.4 and 1.8 ms).",
        evidence="The paper reports 77.3 % for ResNet-152 to ResNet-50 on ImageNet (kd 76.8, dist 76.6) and 73.97 % "
        "for ResNet-32x4 to 8x4 on CIFAR-100 (kd 72.1, dist 73.2, dkd 73.1). Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return partial(pld, temperature=self.temperature, label_floor=self.label_floor)
