"""For each sample, the teacher that knows it best."""

from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from compression.card import MethodCard
from compression.distill.teachers.base import CombineFn
from compression.types import Frozen

TIE = 1e-6
"""Confidences closer than this share the sample."""


def confidence(logits: Tensor, labels: Tensor, *, use_labels: bool) -> Tensor:
    """Weights [K,B]: all on the most confident teacher of each sample, shared equally among ties.

    Confidence is the probability of the true label, or without labels the largest probability. After Roth et al.
    2023, "Fantastic Gains and Where to Find Them" (arXiv:2310.17653): samples are partitioned among sources.
    """
    probs = logits.float().softmax(dim=-1)
    if use_labels:
        index = labels.view(1, -1, 1).expand(len(probs), -1, 1)
        score = probs.gather(2, index).squeeze(2)
    else:
        score = probs.amax(dim=-1)
    best = (score >= score.amax(dim=0, keepdim=True) - TIE).float()
    return best / best.sum(dim=0, keepdim=True)


class Confidence(Frozen):
    """Partition the samples among the teachers by confidence."""

    kind: Literal["confidence"] = "confidence"
    use_labels: bool = True
    """Rank by the probability of the true label; off: by each teacher's own largest probability."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Confidence partition",
        paper="Roth et al. 2023, arXiv:2310.17653",
        summary="Each sample is taught by the teacher most confident in it.",
        needs="Teachers with comparable calibration; labels unless use_labels is off.",
        cost="None.",
        evidence="Not measured here yet.",
    )

    def build(self) -> CombineFn:
        """The combination as a function of tensors."""
        return partial(confidence, use_labels=self.use_labels)
