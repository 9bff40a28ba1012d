"""Rank teachers by how well they predict held-out labels."""

from collections.abc import Callable
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from compression.card import MethodCard
from compression.types import Frozen

ScoreFn = Callable[[Tensor, Tensor, Tensor], float]
"""(features [N,D], logits [N,C], labels [N]) -> score; higher is better."""


def nll_score(features: Tensor, logits: Tensor, labels: Tensor) -> float:
    """Minus the mean negative log-likelihood of the labels, in nats: 0 is perfect."""
    return -float(F.cross_entropy(logits.double(), labels))


class Nll(Frozen):
    """Validation negative log-likelihood: accuracy and calibration in one number."""

    kind: Literal["nll"] = "nll"

    card: ClassVar[MethodCard] = MethodCard(
        name="Validation NLL",
        paper="textbook",
        summary="Minus the mean negative log-likelihood on the validation split.",
        needs="Teachers with the task's own classes.",
        cost="One forward pass over the validation split.",
        evidence="The plain baseline every other selector has to beat.",
    )

    def build(self) -> ScoreFn:
        """The score as a function."""
        return nll_score
