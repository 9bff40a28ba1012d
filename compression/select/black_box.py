"""Rank teachers by how close their mean answers per class are to a perfect teacher's; probabilities alone are needed.

Legend: N samples, C classes.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from compression.card import MethodCard
from compression.select.nll import ScoreFn
from compression.types import Frozen


def mean_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean probabilities a teacher gives the samples of each class, float64 [C,C].

    Rows are true classes, in order, and sum to 1; classes without samples have a row of zeros.

    Args:
        logits: [N,C].
        labels: int64 [N].
    """
    probs = logits.double().softmax(dim=1)
    sums = torch.zeros(probs.shape[1], probs.shape[1], dtype=probs.dtype).index_add_(0, labels, probs)
    return sums / labels.bincount(minlength=len(sums)).clamp(min=1).unsqueeze(1)


def black_box_score(features: Tensor, logits: Tensor, labels: Tensor) -> float:
    """Return the cosine, 0 to 1, between a teacher's mean answers and those of a perfect teacher; higher is better.

    A cheap stand-in of ours for Know2Vec's trained encoders (arXiv:2412.16251): the teacher is the flattened matrix of
    :func:`mean_answers`, the task is the identity, which a perfect teacher gives. Classes without samples are left
    out of both.

    Args:
        features: unused.
        logits: [N,C].
        labels: int64 [N].
    """
    del features
    answers = mean_answers(logits, labels)
    present = int((answers.sum(dim=1) > 0).sum())
    return float(answers.trace() / (answers.norm() * max(present, 1) ** 0.5))


class BlackBox(Frozen):
    """Cosine between mean answers per class and the right ones."""

    kind: Literal["black_box"] = "black_box"

    card: ClassVar[MethodCard] = MethodCard(
        name="Black-box answers (research)",
        paper="Our own stand-in for Know2Vec (Shang et al. 2024, arXiv:2412.16251), without its trained encoders",
        summary="Places a teacher by the mean probabilities it gives each true class, the task by the identity, and "
        "ranks by the angle between them: what is confused with what, and how often, counts.",
        needs="Probabilities on labelled validation data; no features, no weights.",
        cost="One pass over stored validation logits.",
        evidence="Research: nothing is published on this form. On our data students of good and bad teachers "
        "differed by less than chance, so no ranking could be judged. Compare it "
        "with nll before trusting it.",
    )

    def build(self) -> ScoreFn:
        """The score as a function."""
        return black_box_score
