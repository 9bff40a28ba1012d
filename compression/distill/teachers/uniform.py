"""Every teacher counts the same."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from compression.card import MethodCard
from compression.distill.teachers.base import CombineFn
from compression.types import Frozen


def uniform(logits: Tensor, labels: Tensor) -> Tensor:
    """1/K for each of K teachers and every sample, [K,B]."""
    teachers, batch = logits.shape[:2]
    return torch.full((teachers, batch), 1.0 / teachers, device=logits.device)


class Uniform(Frozen):
    """Average the teachers' distributions."""

    kind: Literal["uniform"] = "uniform"

    card: ClassVar[MethodCard] = MethodCard(
        name="Uniform mixture",
        paper="Hinton, Vinyals, Dean 2015, arXiv:1503.02531 (ensembles as teachers)",
        summary="The target is the mean of the teachers' softened distributions.",
        needs="Teachers of about equal quality.",
        cost="None.",
        evidence="Fashion-MNIST: adding a teacher three points weaker gained nothing over the better one alone.",
    )

    def build(self) -> CombineFn:
        """The combination as a function of tensors."""
        return uniform
