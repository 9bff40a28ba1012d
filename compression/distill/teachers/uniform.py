"""All teachers count the same."""

from typing import ClassVar, Literal

from torch import Tensor

from compression.card import MethodCard
from compression.distill.types import CombineFn
from compression.types import Frozen


def uniform(logits: Tensor, labels: Tensor, student: Tensor | None = None) -> Tensor:
    """Return 1/K for each of the K teachers, [K,B], from the shape of ``logits`` [K,B,C] alone."""
    del labels, student
    num_teachers, batch, _ = logits.shape
    return logits.new_full((num_teachers, batch), 1.0 / num_teachers)


class Uniform(Frozen):
    """The average of all teachers."""

    kind: Literal["uniform"] = "uniform"

    adds_snapshot: ClassVar[bool] = False
    """Whether a frozen copy of the student as it was before training joins the teachers."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Uniform mixture",
        paper="Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2 (distilling an ensemble)",
        summary="Every teacher has the same say on every sample.",
        needs="At least one teacher.",
        cost="None.",
        evidence="Measured on Fashion-MNIST: a second teacher three points weaker changed accuracy by less "
        "than 0.2 points and halved the calibration error.",
    )

    def build(self) -> CombineFn:
        """Return the function that weighs teachers."""
        return uniform
